"""Whether a measured time can be believed: rounds that agree, and no speed-up beyond what the operations allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.sweep.cells import Record

DISAGREEMENT = 0.2
"""Rounds agree when their quartiles lie closer together than this part of the median."""
TOLERANCE = 1.05
"""A speed-up may exceed that of the operation counts by this factor, which is noise of the clock."""


@dataclass(frozen=True)
class Spread:
    """A cost over rounds.

    Attributes:
        median: of all rounds.
        low: first quartile.
        high: third quartile; unlike the extremes, quartiles don't widen with every round that is added.
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, interpolated between neighbours."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def doubt(
    total: Spread | None, rounds: int | None, speedup: float | None = None, allowed: float | None = None
) -> str | None:
    """Why a cost can't be relied on, in words; None when nothing speaks against it.

    Args:
        total: seconds of one answer over the rounds; None where only the median is known.
        rounds: how many there were; None where it is not known.
        speedup: measured, how many times as fast as the full model.
        allowed: the same ratio of the operation counts. Pruning saves no time but that of the operations it saves, so
            a measured speed-up beyond this one means that one of the two times is wrong.
    """
    if speedup is not None and allowed is not None and speedup > TOLERANCE * allowed:
        return f"measured {speedup:.2f} times as fast where the operation counts allow {allowed:.2f}"
    if total is not None and total.high - total.low > DISAGREEMENT * total.median:
        return f"rounds disagree: quartiles {1000 * total.low:.3g} and {1000 * total.high:.3g} ms"
    if rounds == 1:
        return "measured in one round only"
    return None


def add_speedups(records: Sequence[Record], full: Mapping[int | None, Record]) -> None:
    """Adds to each cell how much faster than the full model it is, and why that or its cost can't be relied on.

    Args:
        records: cells as in `cells.parquet`, changed in place.
        full: the cell of the full model for each `num_frames`; its own cost is part of every speed-up.
    """
    for record in records:
        record |= _speedups(record, full[record["num_frames"]])
        record["cost_doubt"] = _doubt_of(record)
    for record in records:
        others = full[record["num_frames"]]["cost_doubt"]
        record["speedup_doubt"] = None
        if record.get("speedup_measured") is not None:
            record["speedup_doubt"] = record["cost_doubt"] or (f"all tokens: {others}" if others else None)


def _speedups(record: Record, full: Record) -> dict[str, float]:
    """As the operation counts allow, and as measured without the decoding; quartiles are those of the cell's rounds."""
    speedups: dict[str, float] = {}
    if record.get("flops_total") and full.get("flops_total"):
        speedups["speedup_allowed"] = full["flops_total"] / record["flops_total"]
    if record.get("seconds_total") and full.get("seconds_total"):
        speedups["speedup_measured"] = full["seconds_total"] / record["seconds_total"]
        if record.get("seconds_total_low"):
            speedups["speedup_measured_low"] = full["seconds_total"] / record["seconds_total_high"]
            speedups["speedup_measured_high"] = full["seconds_total"] / record["seconds_total_low"]
    return speedups


def _doubt_of(record: Record) -> str | None:
    if record.get("seconds_total") is None:
        return None
    low, high = record.get("seconds_total_low"), record.get("seconds_total_high")
    total = None if low is None or high is None else Spread(record["seconds_total"], low, high)
    return doubt(total, record.get("cost_rounds"), record.get("speedup_measured"), record.get("speedup_allowed"))
