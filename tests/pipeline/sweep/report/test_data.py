"""A sweep's folder as the report reads it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.sweep.report.data import BASELINES, BEFORE, HYBRID, INSIDE, Sweep, load_sweep
from tests.pipeline.sweep.sweeps import RATIOS, SKILLS, SMALL, cells_with, make_sweep


def test_groups_are_read_from_the_tokens_that_layers_saw(sweep: Sweep) -> None:
    (comparison,) = sweep.comparisons
    groups = {"random": BASELINES, "evs": BEFORE, "fastv": INSIDE, "flashvid": HYBRID, "vitcop": HYBRID}
    assert {name: comparison.group(name) for name in groups} == groups
    assert comparison.methods[:2] == ["vitcop", "random"] and set(comparison.methods) == set(SKILLS)
    assert [point.method for point in comparison.floors] == ["one_frame", "text_only"]
    assert comparison.ratios == list(RATIOS)


def test_seeds_are_pooled(sweep: Sweep) -> None:
    (comparison,) = sweep.comparisons
    (point,) = comparison.at(0.05, "random")
    accuracies = [cell["accuracy"] for cell in point.cells]
    assert len(accuracies) == 3 and point.mean("accuracy") == pytest.approx(np.mean(accuracies))


def test_seeds_whose_times_are_doubted_do_not_count(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5,), questions=8, gallery=False)
    doubted = {"cost_doubt": "rounds disagree", "speedup_doubt": "rounds disagree", "seconds_total": 99.0}
    cells_with(folder, {"random-0.5-s1": doubted | {"speedup_measured": 0.01}})
    (point,) = load_sweep(folder).comparisons[0].at(0.5, "random")
    assert point.doubt is None and (point.timed("seconds_total") or 0) < 1 < (point.mean("seconds_total") or 0)
    assert (point.speedup() or 0) > 1
    cells_with(folder, {f"random-0.5-s{seed}": doubted for seed in range(3)})
    (point,) = load_sweep(folder).comparisons[0].at(0.5, "random")
    assert point.doubt == point.cost_doubt == "rounds disagree"
    assert point.timed("seconds_total") is point.speedup() is point.seconds_answering is None


def test_sweeps_from_before_costs_were_checked_are_checked_when_they_are_read(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5,), questions=8, gallery=False)
    cells_with(folder, {"vitcop-0.5": {"seconds_total": 0.001}})
    table = pq.read_table(folder / "cells.parquet")
    new = [name for name in table.column_names if name.endswith(("_low", "_high", "_doubt")) and "accuracy" not in name]
    pq.write_table(table.drop_columns([*new, "cost_rounds"]), folder / "cells.parquet")
    comparison = load_sweep(folder).comparisons[0]
    assert "operation counts allow" in (comparison.at(0.5, "vitcop")[0].doubt or "")
    assert comparison.at(0.5, "evs")[0].doubt is None


@pytest.mark.parametrize(
    ("manifest", "model", "expected"),
    [
        (None, "embedded", ("embedded", "rendered videos")),
        ("/data/videos/bench/test.jsonl", "/models/tiny-7b", ("tiny-7b", "bench/test.jsonl")),
        ("q.jsonl", "owner/tiny-7b", ("owner/tiny-7b", "q.jsonl")),
    ],
)
def test_model_and_data_by_name(manifest: str | None, model: str, expected: tuple[str, str]) -> None:
    run = {"config": {"input": {"manifest": manifest}, "model": {"model": model}}}
    sweep = Sweep(Path(), run, ())
    assert (sweep.model, sweep.data) == expected
    assert Sweep(Path(), {}, ()).data is Sweep(Path(), {}, ()).model is None
