"""Questions, the clips that they are about, and the manifest that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from pipeline.errors import RowError

INPUT_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "video": pa.string(),
        "question": pa.string(),
        "options": pa.list_(pa.string()),
        "answer": pa.string(),
        "answer_index": pa.int32(),
        "start": pa.float64(),
        "end": pa.float64(),
    }
)
"""The columns that a manifest may have; in the output `answer_index` is also found from `answer`."""
ROW_SCHEMA = pa.schema([*INPUT_SCHEMA, pa.field("options_labelled", pa.bool_())])
"""The columns with which the output repeats a row of the manifest."""
CONTENT = ("video", "start", "end", "question", "options", "answer", "answer_index")
"""The columns that identify a question without its id."""
# One for all rows without such columns: a dict for each of a million rows is 64 MB.
_NOTHING: Mapping[str, object] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question.

    Attributes:
        index: its position in the manifest.
        path: the video file that `video` means.
        options: without labels such as "A. ".
        options_labelled: whether they had labels in the manifest.
        answer_index: of the right option, where there are options and the right one is known.
        carried: those of the carried-through columns that its prompt uses.
        problem: why the row can't be asked; its other values are then the manifest's as text, where they are text.
    """

    index: int
    sample_id: str
    video: str
    path: str
    question: str
    options: tuple[str, ...] | None = None
    options_labelled: bool = False
    answer: str | None = None
    answer_index: int | None = None
    start: float | None = None
    end: float | None = None
    carried: Mapping[str, object] = field(default_factory=lambda: _NOTHING, compare=False)
    problem: RowError | None = field(default=None, compare=False)

    @property
    def columns(self) -> dict[str, object]:
        """The values of the row that a prompt can use, by column."""
        return {name: getattr(self, name) for name in INPUT_SCHEMA.names} | dict(self.carried)

    @property
    def content(self) -> tuple[object, ...]:
        """The values that identify the question without its id; equal in two rows that ask the same."""
        return tuple(getattr(self, name) for name in CONTENT)


@dataclass(frozen=True, slots=True)
class Clip:
    """A span of a video with all the questions about it: decoded once, answered together.

    `id` is its number in the plan, and `shard` the part of the output that it goes to.
    """

    path: str
    start: float | None
    end: float | None
    rows: tuple[Row, ...]
    id: int = 0
    shard: int = 0

    @property
    def problem(self) -> RowError | None:
        """Why its one row can't be asked; None for a clip with questions."""
        return self.rows[0].problem

    @property
    def name(self) -> str:
        """The video and its span, to be read by people."""
        span = "" if self.start is None and self.end is None else f" [{self.start or 0:g}s-{self.end or math.inf:g}s]"
        return self.path + span


@dataclass(frozen=True)
class Manifest:
    """All questions, with the carried-through columns of the same rows in `extras`."""

    rows: list[Row]
    extras: pa.Table

    @property
    def columns(self) -> list[str]:
        """The names of all columns that a prompt can use."""
        return [*INPUT_SCHEMA.names, *self.extras.column_names]

    def with_carried(self, names: Iterable[str]) -> Manifest:
        """The manifest with these of the carried-through columns in its rows as well."""
        table = self.extras.select([name for name in self.extras.column_names if name in set(names)])
        if not table.column_names:
            return self
        rows = [replace(row, carried=values) for row, values in zip(self.rows, table.to_pylist(), strict=True)]
        return replace(self, rows=rows)

    @property
    def sound(self) -> list[Row]:
        """The rows that can be asked."""
        return [row for row in self.rows if row.problem is None]

    @property
    def problems(self) -> list[RowError]:
        """What is wrong with the other rows, in their order."""
        return [row.problem for row in self.rows if row.problem is not None]

    def input_columns(self, rows: Sequence[Row]) -> pa.Table:
        """The input columns of the output for these rows: the known ones, then the carried-through ones."""
        columns = {name: [getattr(row, name) for row in rows] for name in ROW_SCHEMA.names}
        table = pa.table(columns, schema=ROW_SCHEMA)
        # `index` is the row's place in the whole manifest, which is also its place in `extras`.
        carried = self.extras.take(pa.array([row.index for row in rows], pa.int64()))
        for name in self.extras.column_names:
            table = table.append_column(self.extras.schema.field(name), carried[name])
        return table


def group_clips(rows: Iterable[Row]) -> list[Clip]:
    """Clips in the order of their first question, each with all its questions; a row with a problem is alone in one."""
    groups: dict[tuple[str, float | None, float | None, int | None], list[Row]] = {}
    for row in rows:
        # A row with a problem has no video to share, so its own index keeps it apart.
        alone = row.index if row.problem else None
        groups.setdefault((row.path, row.start, row.end, alone), []).append(row)
    return [Clip(*key[:3], tuple(group), id=number) for number, (key, group) in enumerate(groups.items())]


def cut_clips(rows: Iterable[Row], shard_size: int) -> list[Clip]:
    """The clips of these rows, cut into shards of at least `shard_size` questions (the last may have fewer)."""
    clips, shard, questions = [], 0, 0
    for clip in group_clips(rows):
        clips.append(replace(clip, shard=shard))
        questions += len(clip.rows)
        # Shards end between clips, so that no clip has rows in two parts.
        if questions >= shard_size:
            shard, questions = shard + 1, 0
    return clips
