"""Intervals and paired tests."""

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.sweep.statistics import SHOWN_DIFFERENCE, Paired, bootstrap_accuracy, mcnemar, questions_to_show


def test_the_interval_holds_the_mean_and_is_reproducible() -> None:
    correct = np.random.default_rng(0).random(400) < 0.7
    groups = np.arange(400) // 4
    interval = bootstrap_accuracy(correct.tolist(), groups.tolist())
    assert interval.low < interval.mean < interval.high
    assert interval == bootstrap_accuracy(correct.tolist(), groups.tolist())


def test_questions_that_stand_and_fall_together_widen_the_interval() -> None:
    clips = np.random.default_rng(1).random(50) < 0.6
    correct = np.repeat(clips, 8)
    together = bootstrap_accuracy(correct.tolist(), np.repeat(np.arange(50), 8).tolist())
    apart = bootstrap_accuracy(correct.tolist(), list(range(400)))
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_certainty_has_no_width() -> None:
    interval = bootstrap_accuracy([True] * 20, list(range(20)))
    assert (interval.low, interval.mean, interval.high) == (1, 1, 1)


def test_no_questions_is_an_error() -> None:
    with pytest.raises(ValueError, match="no questions"):
        bootstrap_accuracy([], [])


def test_mcnemar_counts_the_disagreements_only() -> None:
    first = {"a": True, "b": True, "c": True, "d": False, "only here": True}
    second = {"a": True, "b": False, "c": False, "d": True}
    assert mcnemar(first, second) == Paired(wins=2, losses=1, p=1.0, n=4)


def test_ten_to_nothing_is_no_accident() -> None:
    first = {str(i): True for i in range(10)}
    second = dict.fromkeys(first, False)
    assert mcnemar(first, second).p == pytest.approx(2 / 2**10)


def test_equal_runs_have_p_one() -> None:
    assert mcnemar({"a": True}, {"a": True}).p == 1.0


def test_the_formula_of_the_sample_size() -> None:
    # (1.959964 sqrt(0.2) + 0.841621 sqrt(0.2 - 0.0025))^2 / 0.0025, worked by hand.
    assert questions_to_show(0.05, 0.2) == 626
    assert Paired(wins=2, losses=7, p=0.18, n=24).questions_to_show() == questions_to_show(0.05, 9 / 24)


@pytest.mark.parametrize(("difference", "disagreement"), [(0.05, 0.2), (0.05, 0.4), (0.1, 0.15), (0.05, 0.0)])
def test_so_many_questions_find_the_difference_four_times_of_five(difference: float, disagreement: float) -> None:
    rng = np.random.default_rng(7)
    n = questions_to_show(difference, disagreement)
    disagreement = max(disagreement, difference)
    wins, losses, _ = rng.multinomial(
        n, [(disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement], size=1500
    ).T
    found = np.mean(
        [
            binomtest(win, win + loss).pvalue < 0.05 if win + loss else False
            for win, loss in zip(wins, losses, strict=True)
        ]
    )
    assert 0.7 < found < 0.9, "the exact test is a little less powerful than the formula's"


def test_more_questions_for_less_difference_more_disagreement_and_more_power() -> None:
    assert questions_to_show(0.02, 0.2) > questions_to_show(0.05, 0.2) > questions_to_show(0.1, 0.2)
    assert questions_to_show(0.05, 0.4) > questions_to_show(0.05, 0.2)
    assert questions_to_show(0.05, 0.2, power=0.9) > questions_to_show(0.05, 0.2)
    assert questions_to_show(SHOWN_DIFFERENCE, 0) == questions_to_show(SHOWN_DIFFERENCE, SHOWN_DIFFERENCE)


@pytest.mark.parametrize("difference", [0, -0.1, 1.5])
def test_a_difference_that_cannot_be_is_refused(difference: float) -> None:
    with pytest.raises(ValueError, match=str(difference)):
        questions_to_show(difference, 0.2)
