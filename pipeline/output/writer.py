"""Rows collected until their shard is complete, then written as one part."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from pipeline.manifest import Clip, Manifest, Row
from pipeline.output.folder import OutputFolder
from pipeline.output.schema import ANSWER_SCHEMA, Columns


class Part(NamedTuple):
    """A part that has been written."""

    name: str
    rows: int


class ShardWriter:
    """Collects rows until a shard has all of its clips, then writes its part.

    Args:
        shard_sizes: clips of each shard, by its number.
        schema: the columns after the input columns.
    """

    def __init__(
        self,
        folder: OutputFolder,
        manifest: Manifest,
        shard_sizes: Mapping[int, int],
        schema: pa.Schema = ANSWER_SCHEMA,
    ) -> None:
        self.folder, self.manifest, self.schema = folder, manifest, schema
        self.missing = dict(shard_sizes)
        self.rows: dict[int, list[tuple[Row, Columns]]] = {}

    def add(self, clip: Clip, rows: Sequence[tuple[Row, Columns]]) -> Part | None:
        """Take all output rows of a clip: answer columns, each with the row that they answer.

        Returns the part that was written because this clip completed its shard.
        """
        self.rows.setdefault(clip.shard, []).extend(rows)
        self.missing[clip.shard] -= 1
        return None if self.missing[clip.shard] else self._write(self.rows.pop(clip.shard))

    def flush(self) -> None:
        """Write the rows of shards that are not complete, when the job ends early."""
        # One part for all leftovers; a resumed run finds their ids and plans only what is missing.
        rows = [row for number in sorted(self.rows) for row in self.rows[number]]
        self.rows.clear()
        if rows:
            self._write(rows)

    def _write(self, rows: Sequence[tuple[Row, Columns]]) -> Part:
        # Clips come back in any order; within a part rows stand as in the manifest.
        rows = sorted(rows, key=lambda pair: pair[0].index)
        table = self.manifest.input_columns([row for row, _ in rows])
        answers = pa.Table.from_pylist([columns for _, columns in rows], schema=self.schema)
        for field, column in zip(self.schema, answers.columns, strict=True):
            table = table.append_column(field, column)
        return Part(self.folder.write(table), table.num_rows)
