"""The cells of a sweep: which methods at which keep ratios and frame counts, and what each came to."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa

from pipeline.config import PruneConfig, SweepConfig, parse_options
from pipeline.errors import ConfigError
from pipeline.statistics import bootstrap_accuracy, mcnemar

FULL = "none"
RANDOM = "random"
UNREACHABLE = "cannot_prune"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        method: as it was asked for, options included (`vitcop:key_score=large`); `none` keeps all tokens.
        keep_ratio: None for floors, which keep what they keep (`one_frame`, `text_only`).
        num_frames: frames of a clip; None where frames are sampled by rate.
        seed: of seeded methods.
    """

    method: str
    keep_ratio: float | None = None
    num_frames: int | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        parts = [self.method]
        parts += [f"{self.keep_ratio:g}"] if self.keep_ratio is not None else []
        parts += [f"{self.num_frames}f"] if self.num_frames is not None else []
        parts += [f"s{self.seed}"] if self.seed is not None else []
        return "-".join(parts)

    @property
    def prune(self) -> PruneConfig:
        """The pruning settings of the main job that make this cell."""
        name, options = split_method(self.method)
        if self.seed is not None:
            options["seed"] = self.seed
        ratio = 1.0 if self.method == FULL else self.keep_ratio or 0.5  # floors ignore the ratio
        return PruneConfig(method=name, keep_ratio=ratio, method_options=options)


def split_method(text: str) -> tuple[str, dict[str, Any]]:
    """`vitcop:key_score=large,merge=mean` as a name and its options."""
    name, colon, rest = text.partition(":")
    try:
        return name, parse_options(rest.split(",")) if colon else {}
    except ValueError as error:
        raise ConfigError(f"--methods {text}: {error}") from error


def named_methods(config: SweepConfig) -> SweepConfig:
    """The settings with every method by its name, so that a record says what `all` stood for."""
    from vitcop import METHODS

    names = chain.from_iterable(METHODS if text == "all" else [text] for text in config.methods)
    return dataclasses.replace(config, methods=tuple(dict.fromkeys(names)))


def cells_of(config: SweepConfig) -> list[Cell]:
    """All cells: for each frame count the full model, the floors, and each method at each ratio with each seed.

    Raises:
        ConfigError: an unknown method or option.
    """
    from vitcop import get_method

    counts: Sequence[int | None] = config.frame_counts or (None,)
    cells = [Cell(method=FULL, num_frames=count) for count in counts]
    for text in named_methods(config).methods:
        name, options = split_method(text)
        try:
            method = get_method(name)(retention_ratio=0.5, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--methods {text}: {error}") from error
        seeded = "seed" in {field.name for field in dataclasses.fields(method)} and "seed" not in options
        seeds: Sequence[int | None] = range(config.seeds) if seeded else (None,)
        ratios: Sequence[float | None] = (None,) if method.fixed_budget else config.keep_ratios
        cells += [
            Cell(method=text, keep_ratio=ratio, num_frames=count, seed=seed)
            for count in counts
            for ratio in ratios
            for seed in seeds
        ]
    return list(dict.fromkeys(cells))  # what is asked for twice is answered once


CELL_SCHEMA = pa.schema(
    {
        "cell": pa.string(),
        "method": pa.string(),
        "settings": pa.string(),
        "keep_ratio": pa.float64(),
        "num_frames": pa.int32(),
        "seed": pa.int32(),
        "reachable": pa.bool_(),
        "reason": pa.string(),
        "query_aware": pa.bool_(),
        "baseline": pa.bool_(),
        "n": pa.int32(),
        "errors": pa.int32(),
        "accuracy": pa.float64(),
        "accuracy_low": pa.float64(),
        "accuracy_high": pa.float64(),
        "kind_column": pa.string(),
        "kind_accuracy": pa.map_(pa.string(), pa.float64()),
        "kind_n": pa.map_(pa.string(), pa.int32()),
        "wins_full": pa.int32(),
        "losses_full": pa.int32(),
        "mcnemar_p_full": pa.float64(),
        "wins_random": pa.int32(),
        "losses_random": pa.int32(),
        "mcnemar_p_random": pa.float64(),
        "differs_from_full": pa.float64(),
        "empty_answers": pa.float64(),
        "visual_tokens": pa.float64(),
        "retention_mean": pa.float64(),
        "retention_min": pa.float64(),
        "retention_max": pa.float64(),
        "kept_per_layer": pa.list_(pa.int32()),
        "kv_bytes": pa.float64(),
        "macs_vision": pa.float64(),
        "macs_language": pa.float64(),
        "flops_total": pa.float64(),
        "seconds_decode": pa.float64(),
        "seconds_vision": pa.float64(),
        "seconds_selection": pa.float64(),
        "seconds_prefill": pa.float64(),
        "seconds_generate": pa.float64(),
        "seconds_per_token": pa.float64(),
        "seconds_total": pa.float64(),
        "videos_per_second": pa.float64(),
        "peak_memory_bytes": pa.int64(),
        "speedup_allowed": pa.float64(),
        "speedup_measured": pa.float64(),
        "cost_runs": pa.int32(),
    }
)
"""The columns of `cells.parquet`; costs are null where they were not measured."""


def summarize_cells(
    cells: Iterable[Cell],
    rows: pa.Table,
    facts: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    kind_column: str | None,
) -> pa.Table:
    """What each cell came to, one row each.

    Args:
        rows: answers of all cells: `cell`, `sample_id`, `clip`, `correct`, `prediction`, `status`, `error_type`,
            `error`, `visual_tokens_full`, `visual_tokens_kept`, and the kind column.
        facts: by cell, columns that the method and the model tell (`settings`, `kept_per_layer`, `macs_language`, ...).
        costs: by cell, measured columns.
        kind_column: which column groups questions, None for none.
    """
    answers = defaultdict(list)
    for row in rows.to_pylist():
        answers[row["cell"]].append(row)
    table: list[dict[str, Any]] = []
    by_cell = {cell: answers[cell.name] for cell in cells}
    for cell, mine in by_cell.items():
        full = answers[Cell(method=FULL, num_frames=cell.num_frames).name]
        record: dict[str, Any] = {"cell": cell.name, **dataclasses.asdict(cell), **_accuracy(mine, kind_column)}
        record |= _reachability(mine) | _retention(mine)
        if cell.method != FULL:
            record |= _against("full", mine, full) | {"differs_from_full": _share_differing(mine, full)}
            record |= _against("random", mine, _random_rows(cell, by_cell))
        table.append({**record, **facts.get(cell.name, {}), **costs.get(cell.name, {})})
    full_costs = {record["num_frames"]: record for record in table if record["method"] == FULL}
    for record in table:
        record |= _speedups(record, full_costs[record["num_frames"]])
    return pa.Table.from_pylist(table, schema=CELL_SCHEMA)


def _random_rows(cell: Cell, by_cell: Mapping[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Answers of random selection at the same budget: its first seed, or for a seeded method the same one."""
    if cell.keep_ratio is None or cell.method == RANDOM:
        return []
    twin = Cell(method=RANDOM, keep_ratio=cell.keep_ratio, num_frames=cell.num_frames, seed=cell.seed or 0)
    return by_cell.get(twin, [])


def _accuracy(rows: Sequence[Mapping[str, Any]], kind_column: str | None) -> dict[str, Any]:
    answered = [row for row in rows if row["status"] == "ok"]
    scored = [row for row in answered if row["correct"] is not None]
    record: dict[str, Any] = {"n": len(answered), "errors": len(rows) - len(answered), "kind_column": kind_column}
    record["empty_answers"] = _mean([not row["prediction"] for row in answered])
    if scored:
        interval = bootstrap_accuracy([row["correct"] for row in scored], [row["clip"] for row in scored])
        record |= {"accuracy": interval.mean, "accuracy_low": interval.low, "accuracy_high": interval.high}
    if kind_column is not None:
        kinds = defaultdict(list)
        for row in scored:
            kinds[str(row[kind_column])].append(row["correct"])
        record["kind_accuracy"] = [(kind, sum(right) / len(right)) for kind, right in sorted(kinds.items())]
        record["kind_n"] = [(kind, len(right)) for kind, right in sorted(kinds.items())]
    return record


def _reachability(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A cell none of whose clips could be pruned as asked is not reachable; the reason is the most common one."""
    refused = [row["error"] for row in rows if row["error_type"] == UNREACHABLE]
    if not rows or len(refused) < len(rows):
        return {"reachable": True, "reason": None}
    return {"reachable": False, "reason": Counter(refused).most_common(1)[0][0], "errors": 0}


def _retention(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    answered = [row for row in rows if row["status"] == "ok"]
    shares = [row["visual_tokens_kept"] / row["visual_tokens_full"] for row in answered]
    if not shares:
        return {}
    return {
        "visual_tokens": _mean([row["visual_tokens_full"] for row in answered]),
        "retention_mean": _mean(shares),
        "retention_min": min(shares),
        "retention_max": max(shares),
    }


def _against(name: str, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, second = (
        {row["sample_id"]: row["correct"] for row in side if row["correct"] is not None} for side in (rows, others)
    )
    if not first.keys() & second.keys():
        return {}
    test = mcnemar(first, second)
    return {f"wins_{name}": test.wins, f"losses_{name}": test.losses, f"mcnemar_p_{name}": test.p}


def _share_differing(rows: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of predictions that are not those of the full model; 0 means that pruning may not have taken place."""
    expected = {row["sample_id"]: row["prediction"] for row in full if row["status"] == "ok"}
    shared = [row for row in rows if row["status"] == "ok" and row["sample_id"] in expected]
    return _mean([row["prediction"] != expected[row["sample_id"]] for row in shared])


def _speedups(record: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """How much faster than full: as the operation counts allow, and as measured without the decoding."""
    speedups: dict[str, Any] = {}
    if record.get("flops_total") and full.get("flops_total"):
        speedups["speedup_allowed"] = full["flops_total"] / record["flops_total"]
    if record.get("seconds_total") and full.get("seconds_total"):
        speedups["speedup_measured"] = full["seconds_total"] / record["seconds_total"]
    return speedups


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
