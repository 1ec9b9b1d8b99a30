"""What is said of each cell of a sweep."""

import math

import pyarrow as pa

from pipeline.sweep.cells import Cell
from pipeline.sweep.summary import summarize_cells


def answers(cell: Cell, correct: list[bool | None], *, error_type: str | None = None) -> list[dict[str, object]]:
    return [
        {
            "cell": cell.name,
            "sample_id": f"q{number}",
            "clip": f"c{number // 2}",
            "kind": "even" if number % 2 == 0 else "odd",
            "answer": "yes",
            "answer_index": None,
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
    assert summary["accuracy"] == 0.75, "an error on a row with a known answer is not right"


def test_bad_rows_leave_an_unreachable_cell_unreachable() -> None:
    """A row of the manifest that can't be asked is an error in every cell, and says nothing of any."""
    cell, full = Cell(method="fastv", keep_ratio=0.1), Cell(method="none")
    rows = [*answers(full, [True] * 3), answers(full, [None] * 4, error_type="bad_row")[3]]
    rows += [*answers(cell, [None] * 3, error_type="cannot_prune"), answers(cell, [None] * 4, error_type="bad_row")[3]]
    whole, refused = summarize_cells([full, cell], pa.Table.from_pylist(rows), {}, {}, None).to_pylist()
    assert whole["accuracy"] == 0.75
    assert not refused["reachable"] and "cannot_prune of fastv" in refused["reason"]
