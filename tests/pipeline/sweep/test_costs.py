"""Cells take turns, and what can't be relied on is measured again."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import SweepConfig, SweepJobConfig
from pipeline.manifest import Clip, Row
from pipeline.model.answering import Answer
from pipeline.sweep.cells import Cell
from pipeline.sweep.costs import REPEATS, SweepMeasurer, merge_costs
from vitcop.methods import get_method

FULL, OURS, RANDOM = Cell(method="none"), Cell(method="vitcop", keep_ratio=0.5), Cell(method="random", keep_ratio=0.5)
CLIP = Clip("v.mp4", None, None, (Row(index=0, sample_id="a", video="v.mp4", path="v.mp4", question="q"),))
OPERATIONS = {FULL: 1.46, OURS: 1.0, RANDOM: 1.0}


class ScriptedModel:
    """A model that takes the seconds it is told, first for the round that warms up; the last ones again and again."""

    def __init__(self, cell: Cell, seconds: Sequence[float], calls: list[Cell]) -> None:
        self.cell, self.seconds, self.calls = cell, iter(seconds), calls
        self.method = get_method("random")(retention_ratio=0.5)
        operations = {"macs_vision": 0.0, "macs_language": OPERATIONS[cell], "kv_bytes": 1, "kept_per_layer": [1]}
        self.record = SimpleNamespace(**operations, kept_index={}, grid=(1, 1, 1))
        self.last = 0.0

    def answer(self, *_: Any) -> list[Answer]:
        self.calls.append(self.cell)
        self.last = next(self.seconds, self.last)
        return [Answer(prediction="x", seconds_prefill=self.last)]


@pytest.fixture
def calls() -> list[Cell]:
    return []


def measure(seconds: dict[Cell, Sequence[float]], calls: list[Cell], rounds: int = 3) -> dict[str, dict[str, float]]:
    measurer = SweepMeasurer.__new__(SweepMeasurer)
    measurer.config = SweepJobConfig(sweep=SweepConfig(cost_rounds=rounds))
    measurer.cells, measurer.counts = list(seconds), [None]
    measurer.models = {cell: ScriptedModel(cell, [99.0, *each], calls) for cell, each in seconds.items()}
    measurer.loaded = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    video = SimpleNamespace(video=SimpleNamespace(frames=np.zeros((1, 2, 2, 3), np.uint8)), seconds=0.5)
    return measurer.answer(CLIP, [video]).costs


def test_what_agrees_is_measured_once_in_turns_each_first_in_turn(calls: list[Cell]) -> None:
    costs = measure({FULL: [1.2, 1.21, 1.19], OURS: [1.0, 1.01, 0.99]}, calls)
    assert [each["cost_runs"] for each in costs.values()] == [3, 3]
    assert costs[OURS.name]["seconds_total"] == 1.0 and costs[OURS.name]["seconds_decode"] == 0.5
    assert costs[OURS.name]["seconds_total_low"] == pytest.approx(0.995)
    assert calls == [FULL, OURS, FULL, OURS, OURS, FULL, FULL, OURS], "warm-up, then rounds that begin in turn"


def test_rounds_that_disagree_are_measured_again_beside_the_full_model(calls: list[Cell]) -> None:
    seconds = {FULL: [1.2], OURS: [1.0, 1.0, 9.0, 1.0], RANDOM: [1.0]}
    costs = measure(seconds, calls)
    assert [costs[cell.name]["cost_runs"] for cell in seconds] == [6, 6, 3]
    assert costs[OURS.name]["seconds_total"] == costs[OURS.name]["seconds_total_high"] == 1.0


def test_a_speedup_beyond_the_operations_is_measured_again_and_kept_as_it_was_found(calls: list[Cell]) -> None:
    costs = measure({FULL: [8.85], OURS: [1.0], RANDOM: [8.0]}, calls)
    assert costs[OURS.name]["cost_runs"] == 3 * (1 + REPEATS) and costs[RANDOM.name]["cost_runs"] == 3
    assert costs[OURS.name]["seconds_total"] == 1.0


def test_one_round_is_followed_by_another(calls: list[Cell]) -> None:
    costs = measure({FULL: [1.2], OURS: [1.0]}, calls, rounds=1)
    assert [each["cost_runs"] for each in costs.values()] == [2, 2]


def rounds_of(*seconds: float) -> Iterator[SimpleNamespace]:
    for each in seconds:
        costs = {"seconds_total": each, "seconds_total_low": 0.9 * each, "seconds_total_high": 1.5 * each}
        yield SimpleNamespace(costs={"cell": costs | {"cost_runs": 3, "seconds_decode": each}})


def test_clips_are_merged_by_medians() -> None:
    merged = merge_costs(list(rounds_of(1.0, 2.0, 30.0)))["cell"]
    assert (merged["seconds_total"], merged["seconds_total_low"], merged["seconds_total_high"]) == (2.0, 1.8, 3.0)
    assert merged["videos_per_second_low"] < merged["videos_per_second"] == 0.5 < merged["videos_per_second_high"]
    assert (merged["cost_runs"], merged["cost_rounds"]) == (9, 3)
