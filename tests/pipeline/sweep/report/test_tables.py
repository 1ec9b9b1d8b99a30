"""The tables of the report."""

import pytest

from pipeline.sweep.report.data import Point, Sweep
from pipeline.sweep.report.findings import LOSS, OPEN, UNTESTED, WIN, PairedDifference
from pipeline.sweep.report.tables import NONE, accuracy_table, cell_table, difference_table, in_words, standing_table

POINT = Point("vitcop", 0.1, ())


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (PairedDifference(POINT, POINT, 0.031, WIN, 0.04, 100, 900), "+3.1 (win, p = 0.040)"),
        (PairedDifference(POINT, POINT, -0.031, LOSS, 0.0001, 100, 900), "−3.1 (loss, p < 0.001)"),
        (
            PairedDifference(POINT, POINT, -0.208, OPEN, 0.18, 24, 1175),
            "−20.8 (not significant, p = 0.180; n = 1,175 would show 5 points)",
        ),
        (PairedDifference(POINT, POINT, 0.1, UNTESTED, None), "+10.0 (untested)"),
    ],
)
def test_a_paired_difference_in_words(difference: PairedDifference, expected: str) -> None:
    assert in_words(difference).replace("\N{NO-BREAK SPACE}", " ") == expected


def test_tables_are_as_wide_as_their_heads(sweep: Sweep) -> None:
    (comparison,) = sweep.comparisons
    tables = [accuracy_table(comparison), standing_table(sweep, comparison), difference_table(sweep, comparison)]
    for table in [*tables, cell_table(comparison)]:
        assert table.rows and {len(row.entries) for row in table.rows} == {len(table.head)}


def test_the_best_of_each_ratio_is_marked_and_no_other(sweep: Sweep) -> None:
    (comparison,) = sweep.comparisons
    table = accuracy_table(comparison)
    methods = [row for row in table.rows if row.method in comparison.methods]
    for column in range(1, len(table.head)):
        entries = [row.entries[column] for row in methods]
        best = max(entry.value for entry in entries if entry.value is not None)
        assert all((entry.mark == "best") == (entry.value == best) for entry in entries)
    fastv = next(row for row in methods if row.method == "fastv")
    assert [entry.text == NONE for entry in fastv.entries[1:]] == [False, False, False, True, True, True]


def test_every_cell_has_a_row_and_columns_without_values_are_left_out(sweep: Sweep) -> None:
    (comparison,) = sweep.comparisons
    table = cell_table(comparison)
    assert {row.cell for row in table.rows} == {cell["cell"] for cell in comparison.cells}
    assert "timing" not in table.head and "total, ms" in table.head
