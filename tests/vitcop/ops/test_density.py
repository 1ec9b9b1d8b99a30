"""Density peaks."""

from __future__ import annotations

import torch

from vitcop.ops.density import density_peaks


def test_density_peaks_ignore_what_is_not_valid() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 6, 3, generator=generator)
    more = torch.cat([points, points.mean(dim=1, keepdim=True)], dim=1)
    valid = torch.tensor([[True] * 6 + [False]])
    score, _ = density_peaks(points, valid[:, :6], 3, 7)
    with_more, _ = density_peaks(more, valid, 3, 7)
    torch.testing.assert_close(with_more[:, :6], score)
    assert with_more[0, 6] == float("-inf")
