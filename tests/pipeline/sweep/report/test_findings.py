"""The sentences say what the numbers say."""

from pathlib import Path

import pytest

from pipeline.sweep.report.data import Sweep, load_sweep
from pipeline.sweep.report.findings import cautions, headline, standings
from tests.pipeline.sweep.sweeps import SMALL, cells_with, make_sweep, write_answers


def told(sweep: Sweep) -> str:
    """The findings and the cautions, details included."""
    (comparison,) = sweep.comparisons
    lines = headline(sweep, comparison)
    lines += [line for caution in cautions(comparison) for line in (caution.text, *caution.details)]
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def test_the_headline_says_what_the_answers_say(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5, 0.1, 0.02), questions=8, gallery=False)
    good, fair, bad = ([True] * count + [False] * (40 - count) for count in (38, 30, 10))
    right = {"none": good, "vitcop-0.5": good, "vitcop-0.1": fair, "vitcop-0.02": bad}
    right |= {"evs-0.5": bad, "evs-0.1": good, "evs-0.02": [*bad[1:], True]}
    right |= {f"random-{ratio}-s{seed}": fair for ratio in (0.5, 0.02) for seed in range(3)}
    # At 10 % one seed of random is worse than ViTCoP and two are as good, so it's a tie.
    right |= {"random-0.1-s0": bad, "random-0.1-s1": fair, "random-0.1-s2": fair}
    write_answers(folder, right)
    sweep = load_sweep(folder)
    text = "\n".join(headline(sweep, sweep.comparisons[0])).replace("\N{NO-BREAK SPACE}", " ")
    assert "The model tiny <model> answered 8 questions about 1 clip, seeing 8 frames of each, with 3 pruning" in text
    assert "With all tokens it is right in 95.0 %" in text
    assert (
        "Against random selection of as many tokens, ViTCoP wins at 50 % (+20.0), loses at 2 % (−50.0), and is " in text
    )
    assert "and is not significantly different at 10 % (+16.7): n = 1,568 would show 5 points, here n = 40." in text
    assert (
        "Against the best other method at each ratio, ViTCoP wins at 50 % (random, +20.0) and loses at "
        "10 % (evs, −20.0) and 2 % (random, −50.0)" in text
    )
    assert (
        "Against all tokens, ViTCoP wins nowhere, loses at 10 % (−20.0) and 2 % (−70.0), and is not significantly "
        "different at 50 % (+0.0): n = " in text
    )
    assert (
        "Over all 6 pairs of another method and a ratio, ViTCoP wins 2, loses 2, and 2 show no significant difference."
        in text
    )
    places = [(standing.place, standing.field) for standing in standings(sweep, sweep.comparisons[0])]
    assert places == [(1, 3), (2, 3), (2, 3)]


def test_kinds_are_compared_with_all_tokens(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5, 0.1), questions=8, gallery=False)
    kinds = {"none": [0.9, 0.8], "vitcop-0.1": [0.85, 0.5], "vitcop-0.5": [0.1, 0.9]}
    changes = {
        cell: {"kind_accuracy": list(zip(("color", "order"), each, strict=True))} for cell, each in kinds.items()
    }
    sweep = load_sweep(cells_with(folder, changes))
    text = "\n".join(headline(sweep, sweep.comparisons[0]))
    assert "furthest behind all tokens on questions of the kind order (−30.0 points) and least on color (−5.0)" in text


def test_too_few_questions_are_no_tie(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.1,), questions=8, gallery=False)
    ours, theirs = [True] * 2 + [False] * 7 + [True] * 15, [False] * 2 + [True] * 22
    write_answers(folder, {"none": theirs, "vitcop-0.1": ours, "random-0.1-s0": theirs, "evs-0.1": ours})
    text = told(load_sweep(folder))
    assert "not significantly different at 10 % (−20.8): n = 1,175 would show 5 points, here n = 24" in text
    assert " tie" not in text


def test_nothing_is_said_to_be_unpruned_unless_the_budget_says_so(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5, 0.1), questions=8, gallery=False)
    same, other = {"differs_from_full": 0.0}, {"differs_from_full": 0.1}
    cells_with(folder, {cell["cell"]: other for cell in load_sweep(folder).comparisons[0].cells})
    cells_with(folder, {"evs-0.5": same | {"retention_mean": 0.4996}, "vitcop-0.5": same | {"retention_mean": 1.0}})
    lines = [caution.text.replace("\N{NO-BREAK SPACE}", " ") for caution in cautions(load_sweep(folder).comparisons[0])]
    assert "Without effect on the answers: evs at 50 % (kept 50.0 %) changed no prediction of the full model." in lines
    (pruned,) = [line for line in lines if "Nothing was pruned" in line]
    assert "vitcop at 50 %" in pruned and "evs" not in pruned


def test_a_full_budget_is_said_even_when_answers_differ(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5,), questions=8, gallery=False)
    cells_with(folder, {"evs-0.5": {"differs_from_full": 0.25, "retention_mean": 1.0}})
    assert "Nothing was pruned: evs at 50 %" in told(load_sweep(folder))


def test_times_that_cannot_be_relied_on_are_no_headline(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5, 0.1), questions=8, gallery=False)
    reason = "measured 8.85 times as fast where the operation counts allow 1.46"
    doubted = {"cost_doubt": reason, "speedup_doubt": reason, "speedup_measured": 8.85}
    cells_with(folder, {"vitcop-0.1": doubted})
    sweep = load_sweep(folder)
    sentences = "\n".join(headline(sweep, sweep.comparisons[0]))
    assert "8.85" not in sentences and "times as fast as with all tokens when it keeps 50" in sentences
    text = told(sweep)
    assert "Unreliable timings: 1 of" in text and f"vitcop at 10 %: {reason}." in text


def test_a_speedup_is_told_with_its_quartiles(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.1,), questions=8, gallery=False)
    quartiles = {"speedup_measured": 1.2, "speedup_measured_low": 1.15, "speedup_measured_high": 1.31}
    cells_with(folder, {"vitcop-0.1": quartiles})
    assert "ViTCoP answers 1.20 (1.15 to 1.31) times as fast as with all tokens when it keeps 10 %" in told(
        load_sweep(folder)
    )


def test_what_is_out_of_reach_is_one_caution_with_a_detail_a_method(sweep: Sweep) -> None:
    (caution,) = [each for each in cautions(sweep.comparisons[0]) if "Not reachable" in each.text]
    (detail,) = caution.details
    assert "1 of 10 methods" in caution.text
    assert detail.replace("\N{NO-BREAK SPACE}", " ").startswith("fastv at 10 %, 5 % and 2 %: layers before 1 see all")


@pytest.mark.parametrize("errors", [0, 3])
def test_errors_and_empty_answers_are_told(tmp_path: Path, errors: int) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.1,), questions=8, gallery=False)
    cells_with(folder, {"vitcop-0.1": {"errors": errors, "empty_answers": errors / 12}})
    text = told(load_sweep(folder))
    assert ("Errors: vitcop at 10 % left 3 questions" in text) == bool(errors)
    assert ("Empty answers: vitcop at 10 % said nothing to 25.0 %" in text) == bool(errors)
