"""Uncertainty of accuracies, and paired tests between two runs on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """McNemar's exact test of two runs on the same questions.

    Attributes:
        wins: questions right in the first run and wrong in the second.
        losses: the reverse.
        p: probability of a split at least as uneven if both were equally good; 1 when the runs agree everywhere.
    """

    wins: int
    losses: int
    p: float


def bootstrap_accuracy(correct: Sequence[bool], groups: Sequence[object], seed: int = 0) -> Interval:
    """Accuracy with a 95 % percentile interval, resampling whole groups.

    Questions on one clip share its frames and its pruning, so clips are drawn, not questions.

    Args:
        correct: for each question.
        groups: the clip of each question.

    Raises:
        ValueError: there are no questions.
    """
    if not len(correct):
        raise ValueError("no questions to bootstrap")
    _, member = np.unique(np.array([str(group) for group in groups]), return_inverse=True)
    right = np.bincount(member, weights=np.asarray(correct, dtype=float))
    count = np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(count), size=(RESAMPLES, len(count)))
    accuracies = right[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    low, high = np.quantile(accuracies, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean(correct)), float(low), float(high))


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> Paired:
    """Compare two runs on the questions that both answered (correct or not, by question id)."""
    shared = first.keys() & second.keys()
    wins = sum(first[name] and not second[name] for name in shared)
    losses = sum(second[name] and not first[name] for name in shared)
    return Paired(wins, losses, float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0)
