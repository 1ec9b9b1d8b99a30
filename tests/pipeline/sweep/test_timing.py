"""Timings that can't be true are found."""

from typing import Any

import numpy as np
import pytest

from pipeline.sweep.timing import TOLERANCE, Spread, add_speedups, doubt, spread


@pytest.mark.parametrize("seed", range(5))
def test_a_spread_holds_half_of_the_rounds(seed: int) -> None:
    rounds = np.random.default_rng(seed).gamma(2, size=41).tolist()
    over = spread(rounds)
    assert min(rounds) <= over.low <= over.median <= over.high <= max(rounds)
    assert sum(over.low <= each <= over.high for each in rounds) == 21
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)


def test_rounds_that_disagree_are_doubted_and_one_outlier_of_many_is_not() -> None:
    assert "rounds disagree" in (doubt(spread([1.0, 1.1, 9.0]), 3) or "")
    assert doubt(spread([1.0, 1.05, 1.1]), 3) is None
    assert doubt(spread([1.0, 1.0, 9.0, 1.0, 1.0, 1.0]), 6) is None


def test_one_round_alone_is_doubted() -> None:
    assert "one round" in (doubt(spread([1.0]), 1) or "")


def test_a_speedup_beyond_the_operations_is_doubted() -> None:
    steady = Spread(1.0, 1.0, 1.0)
    assert doubt(steady, 3, speedup=8.85, allowed=1.46) == (
        "measured 8.85 times as fast where the operation counts allow 1.46"
    )
    assert doubt(steady, 3, speedup=1.4, allowed=1.46) is None
    assert doubt(steady, 3, speedup=1.46 * TOLERANCE * 0.999, allowed=1.46) is None


def record(total: float, flops: float, *, spread: float = 0.0, **columns: Any) -> dict[str, Any]:
    quartiles = {"seconds_total_low": total * (1 - spread), "seconds_total_high": total * (1 + spread)}
    return {"num_frames": None, "seconds_total": total, "flops_total": flops, "cost_rounds": 3} | quartiles | columns


def test_speedups_have_the_spread_of_the_cell() -> None:
    full, ours = record(2.0, 9.0), record(1.0, 3.0, spread=0.05)
    add_speedups([full, ours], {None: full})
    assert (ours["speedup_allowed"], ours["speedup_measured"]) == (3.0, 2.0)
    assert ours["speedup_measured_low"] == pytest.approx(2 / 1.05)
    assert ours["speedup_measured_high"] == pytest.approx(2 / 0.95)
    assert ours["cost_doubt"] is ours["speedup_doubt"] is None


def test_a_speedup_is_no_better_than_the_time_of_all_tokens() -> None:
    full, ours = record(2.0, 9.0, spread=0.5), record(1.0, 3.0)
    add_speedups([full, ours], {None: full})
    assert "rounds disagree" in full["cost_doubt"]
    assert ours["cost_doubt"] is None and ours["speedup_doubt"].startswith("all tokens: rounds disagree")


def test_a_time_that_beats_the_operations_is_doubted_itself() -> None:
    full, ours = record(8.85, 1.46), record(1.0, 1.0)
    add_speedups([full, ours], {None: full})
    assert "8.85" in ours["cost_doubt"] and "1.46" in ours["speedup_doubt"] and full["cost_doubt"] is None


def test_what_was_not_measured_is_not_doubted() -> None:
    full, ours = record(2.0, 9.0), {"num_frames": None}
    add_speedups([full, ours], {None: full})
    assert ours == {"num_frames": None, "cost_doubt": None, "speedup_doubt": None}
