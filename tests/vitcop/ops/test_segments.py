"""Runs of frames."""

from __future__ import annotations

import torch

from vitcop.ops.segments import split_at_changes


def test_clips_are_cut_where_they_change_and_often_enough() -> None:
    similarity = torch.tensor([[0.99, 0.5, 0.97, 0.98], [0.3, 0.2, 0.1, 0.4]])
    segments = split_at_changes(similarity, threshold=0.9, least=3)
    assert segments.first.tolist() == [[0, 0, 2, 3, 3], [0, 1, 2, 3, 4]]
    assert segments.last.tolist() == [[1, 1, 2, 4, 4], [0, 1, 2, 3, 4]]
    assert segments.place.tolist() == [[0, 1, 0, 0, 1], [0] * 5]
    assert segments.sum(torch.tensor([[1, 2, 3, 4, 5]] * 2)).tolist() == [[3, 3, 3, 9, 9], [1, 2, 3, 4, 5]]
    values = torch.tensor([[1.0, 2, 3, 4, 5]] * 2)[..., None]
    assert segments.mean(values)[0].flatten().tolist() == [1.5, 1.5, 3, 4.5, 4.5]
