"""What each cell of a sweep came to: accuracy, paired tests and costs, the rows of `cells.parquet`."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from pipeline.sweep.cells import FULL, RANDOM, UNREACHABLE, Cell, Record
from pipeline.sweep.statistics import bootstrap_accuracy, mcnemar
from pipeline.sweep.timing import add_speedups

TIMED = ("vision", "selection", "prefill", "generate", "per_token", "total")

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
        **{
            f"{cost}{quartile}": pa.float64()
            for cost in (*(f"seconds_{phase}" for phase in TIMED), "videos_per_second", "speedup_measured")
            for quartile in ("", "_low", "_high")
        },
        "peak_memory_bytes": pa.int64(),
        "speedup_allowed": pa.float64(),
        "cost_runs": pa.int32(),
        "cost_rounds": pa.int32(),
        "cost_doubt": pa.string(),
        "speedup_doubt": pa.string(),
    }
)
"""The columns of `cells.parquet`.

Costs are medians, null where they were not measured; `_low` and `_high` are their quartiles over rounds.
`seconds_decode` was measured once a clip. `cost_doubt` and `speedup_doubt` say why a cost can't be relied on.
"""


def summarize_cells(
    cells: Iterable[Cell],
    rows: pa.Table,
    facts: Mapping[str, Record],
    costs: Mapping[str, Record],
    kind_column: str | None,
) -> pa.Table:
    """What each cell came to, one row each.

    Args:
        rows: answers of all cells: `cell`, `sample_id`, `clip`, `answer`, `answer_index`, `correct`, `prediction`,
            `status`, `error_type`, `error`, `visual_tokens_full`, `visual_tokens_kept`, and the kind column.
        facts: by cell, columns that the method and the model tell (`settings`, `kept_per_layer`, `macs_language`, ...).
        costs: by cell, measured columns.
        kind_column: which column groups questions, None for none.
    """
    answers = defaultdict(list)  # cell name -> its rows
    for row in rows.to_pylist():
        answers[row["cell"]].append(row)
    table: list[Record] = []
    by_cell = {cell: answers[cell.name] for cell in cells}
    for cell, mine in by_cell.items():
        # Paired tests compare with the full model on the same frames.
        full = answers[Cell(method=FULL, num_frames=cell.num_frames).name]
        record: Record = {"cell": cell.name, **dataclasses.asdict(cell), **_accuracy(mine, kind_column)}
        # Reachability comes after accuracy: it takes back the errors of a cell that can't be reached.
        record |= _reachability(mine) | _retention(mine)
        if cell.method != FULL:
            record |= _against("full", mine, full) | {"differs_from_full": _share_differing(mine, full)}
            record |= _against("random", mine, _random_rows(cell, by_cell))
        table.append({**record, **facts.get(cell.name, {}), **costs.get(cell.name, {})})
    add_speedups(table, {record["num_frames"]: record for record in table if record["method"] == FULL})
    return pa.Table.from_pylist(table, schema=CELL_SCHEMA)


def _random_rows(cell: Cell, by_cell: Mapping[Cell, list[Record]]) -> list[Record]:
    """Answers of random selection at the same budget: its first seed, or for a seeded method the same one."""
    if cell.keep_ratio is None or cell.method == RANDOM:
        return []
    twin = Cell(method=RANDOM, keep_ratio=cell.keep_ratio, num_frames=cell.num_frames, seed=cell.seed or 0)
    return by_cell.get(twin, [])


def _accuracy(rows: Sequence[Record], kind_column: str | None) -> Record:
    """Of the rows whose answer is known; those with an error stay in the denominator, as not right."""
    answered = [row for row in rows if row["status"] == "ok"]
    scored = [
        {**row, "correct": bool(row["correct"])}
        for row in rows
        if row["correct"] is not None or _failed_with_known_answer(row)
    ]
    record: Record = {"n": len(answered), "errors": len(rows) - len(answered), "kind_column": kind_column}
    record["empty_answers"] = _mean([not row["prediction"] for row in answered])
    if scored:
        # Questions on one clip stand and fall together, so clips are resampled.
        interval = bootstrap_accuracy([row["correct"] for row in scored], [row["clip"] for row in scored])
        record |= {"accuracy": interval.mean, "accuracy_low": interval.low, "accuracy_high": interval.high}
    if kind_column is not None:
        kinds = defaultdict(list)
        for row in scored:
            kinds[str(row[kind_column])].append(row["correct"])
        record["kind_accuracy"] = [(kind, sum(right) / len(right)) for kind, right in sorted(kinds.items())]
        record["kind_n"] = [(kind, len(right)) for kind, right in sorted(kinds.items())]
    return record


def _failed_with_known_answer(row: Record) -> bool:
    """Whether a row is an error that counts against the cell; what a cell can't reach is no wrong answer of it."""
    if row["status"] != "error" or row["error_type"] == UNREACHABLE:
        return False
    return row["answer"] is not None or row["answer_index"] is not None


def _reachability(rows: Sequence[Record]) -> Record:
    """A cell none of whose clips could be pruned as asked is not reachable; the reason is the most common one."""
    refused = [row["error"] for row in rows if row["error_type"] == UNREACHABLE]
    if not refused or any(row["status"] == "ok" for row in rows):
        return {"reachable": True, "reason": None}
    return {"reachable": False, "reason": Counter(refused).most_common(1)[0][0], "errors": 0}


def _retention(rows: Sequence[Record]) -> Record:
    """The share of visual tokens that the layers saw on average, over all answers."""
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


def _against(name: str, rows: Sequence[Record], others: Sequence[Record]) -> Record:
    """McNemar's test against other answers to the same questions; nothing when there are none."""
    first, second = (
        {row["sample_id"]: row["correct"] for row in side if row["correct"] is not None} for side in (rows, others)
    )
    if not first.keys() & second.keys():
        return {}
    test = mcnemar(first, second)
    return {f"wins_{name}": test.wins, f"losses_{name}": test.losses, f"mcnemar_p_{name}": test.p}


def _share_differing(rows: Sequence[Record], full: Sequence[Record]) -> float | None:
    """Share of predictions that are not those of the full model."""
    expected = {row["sample_id"]: row["prediction"] for row in full if row["status"] == "ok"}
    shared = [row for row in rows if row["status"] == "ok" and row["sample_id"] in expected]
    return _mean([row["prediction"] != expected[row["sample_id"]] for row in shared])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
