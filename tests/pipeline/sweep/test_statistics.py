"""Intervals and paired tests."""

import numpy as np
import pytest

from pipeline.sweep.statistics import Paired, bootstrap_accuracy, mcnemar


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
    assert mcnemar(first, second) == Paired(wins=2, losses=1, p=1.0)


def test_ten_to_nothing_is_no_accident() -> None:
    first = {str(i): True for i in range(10)}
    second = dict.fromkeys(first, False)
    assert mcnemar(first, second).p == pytest.approx(2 / 2**10)


def test_equal_runs_have_p_one() -> None:
    assert mcnemar({"a": True}, {"a": True}).p == 1.0
