"""Cells of a sweep and what is said of them."""

import math

import pyarrow as pa
import pytest

from pipeline.commandline import from_mapping
from pipeline.config import SweepConfig, SweepJobConfig
from pipeline.errors import ConfigError
from pipeline.sweep import Cell, cells_of, summarize_cells


def test_cells_are_full_and_each_method_at_each_ratio_with_each_seed() -> None:
    config = SweepConfig(
        methods=("vitcop", "random", "one_frame"), keep_ratios=(0.5, 0.1), frame_counts=(4, 8), seeds=2
    )
    cells = cells_of(config)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 2 * (1 + 2 + 2 * 2 + 1)
    assert {"none-4f", "vitcop-0.5-8f", "random-0.1-4f-s1", "one_frame-8f"} <= set(names)


def test_every_known_method_is_there_by_default() -> None:
    from vitcop.methods import METHODS

    assert {cell.method for cell in cells_of(SweepConfig(keep_ratios=(0.5,)))} == {"none", *METHODS}


def test_what_is_asked_for_twice_is_one_cell() -> None:
    once = cells_of(SweepConfig(keep_ratios=(0.5,), frame_counts=(8,)))
    assert cells_of(SweepConfig(methods=("all", "vitcop"), keep_ratios=(0.5, 0.5), frame_counts=(8, 8))) == once


def test_options_of_a_method_reach_its_settings() -> None:
    (_, cell) = cells_of(SweepConfig(methods=("vitcop:key_score=large,merge=mean",), keep_ratios=(0.25,)))
    assert cell.prune.method == "vitcop" and cell.prune.keep_ratio == 0.25
    assert cell.prune.method_options == {"key_score": "large", "merge": "mean"}


@pytest.mark.parametrize("text", ["unknown", "vitcop:no_such_option=1", "vitcop:key_score=9", "vitcop:oops"])
def test_what_no_method_takes_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        cells_of(SweepConfig(methods=(text,)))


def test_a_yaml_file_may_list_methods_and_ratios() -> None:
    config = from_mapping(SweepJobConfig, {"sweep": {"methods": ["vitcop"], "keep_ratios": [0.5, 0.25]}})
    assert config.sweep.methods == ("vitcop",) and config.sweep.keep_ratios == (0.5, 0.25)


def answers(cell: Cell, correct: list[bool | None], *, error_type: str | None = None) -> list[dict[str, object]]:
    return [
        {
            "cell": cell.name,
            "sample_id": f"q{number}",
            "clip": f"c{number // 2}",
            "kind": "even" if number % 2 == 0 else "odd",
            "correct": right if error_type is None else None,
            "prediction": None if error_type else ("yes" if right else ""),
            "status": "error" if error_type else "ok",
            "error_type": error_type,
            "error": f"{error_type} of {cell.method}" if error_type else None,
            "visual_tokens_full": 100,
            "visual_tokens_kept": 100 * (cell.keep_ratio or 1.0),
        }
        for number, right in enumerate(correct)
    ]


def test_a_summary_compares_with_full_and_with_random() -> None:
    full, random, ours, never = (
        Cell(method="none"),
        Cell(method="random", keep_ratio=0.25, seed=0),
        Cell(method="vitcop", keep_ratio=0.25),
        Cell(method="fastv", keep_ratio=0.25),
    )
    rows = answers(full, [True] * 8) + answers(random, [False] * 6 + [True] * 2)
    rows += answers(ours, [True] * 6 + [False] * 2) + answers(never, [None] * 8, error_type="cannot_prune")
    costs = {full.name: {"seconds_total": 2.0}, ours.name: {"seconds_total": 1.0}}
    facts = {full.name: {"flops_total": 9.0}, ours.name: {"flops_total": 3.0}}
    table = summarize_cells([full, random, ours, never], pa.Table.from_pylist(rows), facts, costs, "kind")
    by_method = {row["method"]: row for row in table.to_pylist()}

    vitcop = by_method["vitcop"]
    assert vitcop["accuracy"] == 0.75 and vitcop["accuracy_low"] <= 0.75 <= vitcop["accuracy_high"]
    assert (vitcop["wins_full"], vitcop["losses_full"]) == (0, 2)
    assert (vitcop["wins_random"], vitcop["losses_random"]) == (6, 2)
    assert vitcop["differs_from_full"] == vitcop["empty_answers"] == 0.25
    assert dict(vitcop["kind_accuracy"]) == {"even": 0.75, "odd": 0.75}
    assert (vitcop["speedup_allowed"], vitcop["speedup_measured"]) == (3.0, 2.0)
    assert math.isclose(vitcop["retention_mean"], 0.25)

    assert by_method["none"]["differs_from_full"] is None
    assert not by_method["fastv"]["reachable"] and "cannot_prune of fastv" in by_method["fastv"]["reason"]
    assert by_method["fastv"]["accuracy"] is None and by_method["fastv"]["n"] == 0


def test_some_errors_do_not_make_a_cell_unreachable() -> None:
    cell, full = Cell(method="vitcop", keep_ratio=0.5), Cell(method="none")
    rows = answers(full, [True] * 4) + answers(cell, [True] * 3)
    rows += [answers(cell, [None] * 4, error_type="video_unreadable")[3]]
    summary = summarize_cells([full, cell], pa.Table.from_pylist(rows), {}, {}, None).to_pylist()[1]
    assert summary["reachable"] and summary["errors"] == 1 and summary["n"] == 3
