"""Cosine similarities of visual tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def unit(features: Tensor) -> Tensor:
    """Features (..., D) scaled to length 1, in float32."""
    return functional.normalize(features.float(), dim=-1)


def similarity_to_previous(features: Tensor) -> Tensor:
    """Cosine of each token with the one at its place a frame earlier: (B, F, N, D) -> (B, F - 1, N)."""
    points = unit(features)
    return (points[:, 1:] * points[:, :-1]).sum(dim=-1)
