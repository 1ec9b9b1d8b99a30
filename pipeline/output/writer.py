"""Rows collected until their shard is complete, then written as one part."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.manifest import Clip, Manifest, Row
from pipeline.output.folder import OutputFolder
from pipeline.output.schema import ANSWER_SCHEMA


class ShardWriter:
    """Collects rows until a shard has all of its clips, then writes its part.

    Args:
        schema: the columns after the input columns.
    """

    def __init__(self, folder: OutputFolder, manifest: Manifest, schema: pa.Schema = ANSWER_SCHEMA) -> None:
        self.folder, self.manifest, self.schema = folder, manifest, schema
        self.shard_of: dict[int, int] = {}
        self.missing: list[int] = []
        self.rows: dict[int, list[tuple[Row, dict[str, Any]]]] = {}

    def expect(self, shards: Iterable[Sequence[Clip]]) -> None:
        """Says which clips make a shard."""
        for shard in shards:
            self.shard_of |= {clip.rows[0].index: len(self.missing) for clip in shard}
            self.missing.append(len(shard))

    def add(self, clip: Clip, rows: Sequence[tuple[Row, dict[str, Any]]]) -> None:
        """Takes all output rows of a clip: answer columns, each with the row that they answer."""
        number = self.shard_of[clip.rows[0].index]
        self.rows.setdefault(number, []).extend(rows)
        self.missing[number] -= 1
        if not self.missing[number]:
            self._write(self.rows.pop(number))

    def flush(self) -> None:
        """Writes the rows of shards that are not complete, when the job ends early."""
        rows = [row for number in sorted(self.rows) for row in self.rows[number]]
        self.rows.clear()
        if rows:
            self._write(rows)

    def _write(self, rows: Sequence[tuple[Row, dict[str, Any]]]) -> None:
        rows = sorted(rows, key=lambda pair: pair[0].index)
        table = self.manifest.input_columns([row for row, _ in rows])
        answers = pa.Table.from_pylist([columns for _, columns in rows], schema=self.schema)
        for field, column in zip(self.schema, answers.columns, strict=True):
            table = table.append_column(field, column)
        self.folder.write(table)
