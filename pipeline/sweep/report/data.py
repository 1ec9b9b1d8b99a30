"""A sweep's folder as the report reads it: cells, their seeds pooled, and who was right where."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.sweep.cells import FULL, RANDOM
from pipeline.sweep.report.words import share
from pipeline.sweep.timing import add_speedups

SUBJECT = "vitcop"
SUBJECT_TITLE = "ViTCoP"
CHOSEN_RATIO = 0.1
"""What bars and heat maps show unless the run says otherwise."""
BASELINES, BEFORE, INSIDE, HYBRID = "baselines", "before the model", "inside the model", "before and inside"
GROUPS = (BASELINES, BEFORE, INSIDE, HYBRID)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A method at a keep ratio: the cells of its seeds, or its only one.

    Attributes:
        keep_ratio: as asked for; None for full and for floors.
    """

    method: str
    keep_ratio: float | None
    cells: tuple[Record, ...]

    @property
    def reachable(self) -> bool:
        return any(cell["reachable"] for cell in self.cells)

    @property
    def label(self) -> str:
        return "all tokens" if self.method == FULL else self.method

    @property
    def title(self) -> str:
        return self.label if self.keep_ratio is None else f"{self.label} at {share(self.keep_ratio)}"

    def mean(self, column: str) -> float | None:
        """Mean of a column over the seeds that have it."""
        values = [cell[column] for cell in self.cells if cell.get(column) is not None]
        return sum(values) / len(values) if values else None

    def timed(self, column: str) -> float | None:
        """Mean of a measured time or pace over the seeds whose cost can be relied on; None when none can."""
        return Point(self.method, self.keep_ratio, tuple(c for c in self.cells if not c["cost_doubt"])).mean(column)

    def speedup(self, quartile: str = "") -> float | None:
        """Mean measured speed-up over the seeds of which it can be relied on; None when none can.

        Args:
            quartile: "_low" or "_high", that of the rounds instead of the median.
        """
        cells = tuple(cell for cell in self.cells if not cell["speedup_doubt"])
        return Point(self.method, self.keep_ratio, cells).mean(f"speedup_measured{quartile}")

    @property
    def cost_doubt(self) -> str | None:
        """Why its times can't be relied on, when that holds for every seed."""
        return self._shared_doubt("cost_doubt")

    @property
    def doubt(self) -> str | None:
        """Why its times, or the speed-ups made of them, can't be relied on, when that holds for every seed."""
        return self.cost_doubt or self._shared_doubt("speedup_doubt")

    def _shared_doubt(self, column: str) -> str | None:
        reasons = [cell[column] for cell in self.cells]
        return reasons[0] if all(reasons) else None

    def kinds(self) -> dict[str, float]:
        """Accuracy of each kind of question, mean over seeds."""
        found = defaultdict(list)
        for cell in self.cells:
            for kind, accuracy in cell["kind_accuracy"] or ():
                found[kind].append(accuracy)
        return {kind: sum(values) / len(values) for kind, values in found.items()}

    @property
    def seconds_answering(self) -> float | None:
        """Seconds from the frames to the answer, decoding left out; None where they can't be relied on."""
        pace = self.timed("videos_per_second")
        return 1 / pace if pace else None


@dataclass(frozen=True)
class Comparison:
    """All points of one frame count; only these are compared with each other.

    Attributes:
        num_frames: None where frames were sampled as the run's configuration says.
    """

    num_frames: int | None
    points: tuple[Point, ...]

    @property
    def cells(self) -> list[Record]:
        """All cells: those without a keep ratio, then by method in the order of `methods`, largest ratio first."""
        order = {method: number for number, method in enumerate(self.methods, 1)}
        points = sorted(self.points, key=lambda point: (order.get(point.method, 0), -(point.keep_ratio or 0)))
        return [cell for point in points for cell in point.cells]

    @cached_property
    def full(self) -> Point | None:
        return next((point for point in self.points if point.method == FULL), None)

    @cached_property
    def floors(self) -> list[Point]:
        """Points that keep what they keep, whatever the ratio."""
        return [point for point in self.points if point.keep_ratio is None and point.method != FULL]

    @cached_property
    def ratios(self) -> list[float]:
        """The keep ratios, largest first."""
        return sorted({point.keep_ratio for point in self.points if point.keep_ratio is not None}, reverse=True)

    @cached_property
    def methods(self) -> list[str]:
        """Methods that take a keep ratio: ViTCoP, random, then the others by group and name."""
        found = {point.method for point in self.points if point.keep_ratio is not None}
        return sorted(found, key=lambda name: (rank(name), GROUPS.index(self.group(name)), name))

    def of(self, method: str) -> list[Point]:
        """The points of a method that were reached, largest ratio first."""
        mine = [point for point in self.points if point.method == method and point.reachable]
        return sorted(mine, key=lambda point: -(point.keep_ratio or 0))

    def at(self, ratio: float, method: str | None = None) -> list[Point]:
        """The points that were reached at a keep ratio, of all methods or of one."""
        return [
            point
            for name in self.methods
            if method in (None, name)
            for point in self.of(name)
            if point.keep_ratio == ratio
        ]

    def nearest(self, wanted: float) -> float:
        """The keep ratio nearest to the wanted one."""
        return min(self.ratios, key=lambda ratio: abs(ratio - wanted))

    def group(self, method: str) -> str:
        """Where a method prunes, read from the tokens its layers saw."""
        mine = [point for point in self.points if point.method == method]
        if any(cell["baseline"] for point in mine for cell in point.cells):
            return BASELINES
        shapes = [_shape(cell) for point in mine for cell in point.cells if cell["kept_per_layer"]]
        return max(set(shapes), key=shapes.count) if shapes else BEFORE


@dataclass(frozen=True)
class Sweep:
    """What a sweep left in its folder.

    Attributes:
        run: `run.json`, empty when there is none.
        correct: by cell, which questions were answered right (None where the right answer is unknown).
        clips: how many spans of videos the questions are about; None without answers.
    """

    folder: Path
    run: Record
    comparisons: tuple[Comparison, ...]
    correct: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    clips: int | None = None

    @property
    def chosen_ratio(self) -> float:
        """The keep ratio that bars and heat maps show; comparisons may have only one near it."""
        return self.setting("sweep", "gallery_ratio") or CHOSEN_RATIO

    @property
    def model(self) -> str | None:
        """The model's name, of a folder the last part; None when it is not recorded."""
        name = self.setting("model", "model")
        return Path(name).name if name and Path(name).is_absolute() else name

    @property
    def data(self) -> str | None:
        """What the questions came from, the last two parts of a path; None when it is not recorded."""
        if self.setting("input") is None:
            return None
        manifest = self.setting("input", "manifest")
        return "rendered videos" if manifest is None else "/".join(Path(manifest).parts[-2:]).lstrip("/")

    def setting(self, *path: str) -> Any:
        """A setting of the run, None when it is not recorded."""
        value: Any = self.run.get("config", {})
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def load_sweep(folder: Path) -> Sweep:
    """Reads `cells.parquet`, and `run.json` and `answers/` where they are.

    Raises:
        ConfigError: there is no `cells.parquet`, or it has no cells.
    """
    file = folder / "cells.parquet"
    if not file.is_file():
        raise ConfigError(f"{folder} has no cells.parquet; give the output folder of a sweep that has finished")
    cells = pq.read_table(file).to_pylist()
    if not cells:
        raise ConfigError(f"{file} has no cells; run the sweep again")
    if "cost_doubt" not in cells[0]:  # written before costs were checked
        add_speedups(cells, {cell["num_frames"]: cell for cell in cells if cell["method"] == FULL})
    run = folder / "run.json"
    correct, clips = _read_answers(sorted((folder / "answers").glob("part-*.parquet")))
    return Sweep(
        folder=folder,
        run=json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {},
        comparisons=tuple(_comparisons(cells)),
        correct=correct,
        clips=clips,
    )


def _comparisons(cells: Iterable[Record]) -> Iterable[Comparison]:
    points: dict[int | None, dict[tuple[str, float | None], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        ratio = None if cell["method"] == FULL else cell["keep_ratio"]
        points[cell["num_frames"]][cell["method"], ratio].append(cell)
    for count in sorted(points, key=lambda count: count or 0):
        pooled = (Point(method, ratio, tuple(seeds)) for (method, ratio), seeds in points[count].items())
        yield Comparison(count, tuple(pooled))


def _read_answers(parts: Sequence[Path]) -> tuple[dict[str, dict[str, bool]], int | None]:
    """By cell, whether each question with a known answer was answered right; and the number of clips."""
    correct: dict[str, dict[str, bool]] = defaultdict(dict)
    clips = set()
    for part in parts:
        names = pq.read_schema(part).names
        table = pq.read_table(part, columns=["cell", "sample_id", "correct"])
        for cell, sample, right in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if right is not None:  # questions without a known answer can't be compared
                correct[cell][sample] = right
        # A clip is a span of a video; the same one may stand in several parts.
        span = pq.read_table(part, columns=[name for name in ("video", "start", "end") if name in names])
        clips |= {tuple(row.values()) for row in _distinct(span).to_pylist()}
    return dict(correct), len(clips) if parts else None


def _distinct(table: pa.Table) -> pa.Table:
    return table.group_by(table.column_names).aggregate([])


def rank(method: str) -> int:
    """Order of the report: all tokens, ViTCoP, its variants, random, all others."""
    first = (FULL, SUBJECT)
    if method in first:
        return first.index(method)
    return 2 if is_subject(method) else 3 if method == RANDOM else 4


def is_subject(method: str) -> bool:
    """Whether this is ViTCoP or a variant of it (`vitcop:key_score=large`)."""
    return method.partition(":")[0] == SUBJECT


def _shape(cell: Record) -> str:
    kept = cell["kept_per_layer"]
    if min(kept) == max(kept):
        return BEFORE
    return INSIDE if kept[0] >= (cell["visual_tokens"] or 0) else HYBRID
