"""Exact totals."""

from __future__ import annotations

import torch

from vitcop.ops.quotas import meet_count


def test_a_total_is_met_by_the_lowest_dropped_and_the_highest_added() -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    score = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.1, 0.9, 0.8, 0.2]])
    assert meet_count(mask, score, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert meet_count(mask, score, 3).tolist() == [[True, True, True, False], [True, True, True, False]]
