"""Uncertainty of accuracies, and paired tests between two runs on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

RESAMPLES = 2000
LEVEL = 0.95
POWER = 0.8
SHOWN_DIFFERENCE = 0.05
"""Of accuracies: what a reader of a comparison would want to see."""


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
        n: questions that both answered.
    """

    wins: int
    losses: int
    p: float
    n: int

    def questions_to_show(self, difference: float = SHOWN_DIFFERENCE) -> int:
        """How many questions would show a difference of accuracies, if the runs disagree as often as on these."""
        return questions_to_show(difference, (self.wins + self.losses) / self.n)


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
    # (G,) right answers and questions of each clip
    right = np.bincount(member, weights=np.asarray(correct, dtype=float))
    count = np.bincount(member)
    # (RESAMPLES, G) clips drawn with replacement
    drawn = np.random.default_rng(seed).integers(len(count), size=(RESAMPLES, len(count)))
    accuracies = right[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    low, high = np.quantile(accuracies, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean(correct)), float(low), float(high))


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> Paired:
    """Compare two runs on the questions that both answered (correct or not, by question id)."""
    shared = first.keys() & second.keys()
    wins = sum(first[name] and not second[name] for name in shared)
    losses = sum(second[name] and not first[name] for name in shared)
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Paired(wins, losses, p, len(shared))


def questions_to_show(difference: float, disagreement: float, power: float = POWER) -> int:
    """How many questions McNemar's test needs to find a difference of accuracies.

    With d the difference and s the share of questions on which the two runs disagree (one right, one wrong), it is

        n = (z(1 - alpha / 2) sqrt(s) + z(power) sqrt(s - d^2))^2 / d^2

    (Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43, 1987,
    207-211). The formula is for the test's normal form; the exact test needs a few per cent more. Questions count as
    independent: several on one clip are worth less.

    Args:
        difference: of the accuracies, in (0, 1].
        disagreement: s; runs that differ by d disagree on a share of d at least, so no less is taken.
        power: probability of finding the difference, at a significance level of 5 %.

    Raises:
        ValueError: no such difference.
    """
    if not 0 < difference <= 1:
        raise ValueError(f"difference is {difference!r}; it must be in (0, 1]")
    disagreement = max(disagreement, difference)
    significant, found = float(norm.ppf((1 + LEVEL) / 2)), float(norm.ppf(power))
    root = significant * math.sqrt(disagreement) + found * math.sqrt(disagreement - difference**2)
    return math.ceil((root / difference) ** 2)
