"""Cosine similarities of visual tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_ELEMENTS = 1 << 24
"""Largest block of a similarity matrix, in elements: 64 MiB in float32."""


def unit(features: Tensor) -> Tensor:
    """Features (..., D) scaled to length 1, in float32."""
    return functional.normalize(features.float(), dim=-1)


def similarity_to_previous(features: Tensor) -> Tensor:
    """Cosine of tokens with what stood at their place one before: (B, F, ..., D) -> (B, F - 1, ...)."""
    points = unit(features)
    return (points[:, 1:] * points[:, :-1]).sum(dim=-1)


def farthest_directions(
    points: Tensor, count: int, weight: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """Choose directions greedily, each the farthest in cosine from those chosen before it.

    The distance from i to j is `weight_j (1 - cos(i, j))`. Rows of the distance matrix are made when they are needed,
    so that the matrix never exists as a whole.

    Args:
        points: (G, n, D), of length 1.
        weight: (G, n); 1 if not given.
        first: (G,) the first choice; if not given, the point whose nearest other point is farthest.

    Returns:
        (G, count) different indices in order of choice, for count <= n.
    """
    # (G, n) weight, and (G,) the point that was chosen last
    weight = torch.ones_like(points[..., 0]) if weight is None else weight.float()
    choice = _distance_to_nearest(points, weight).argmax(dim=1) if first is None else first
    # (G, n) distance to the nearest chosen point
    nearest = torch.full_like(weight, float("inf"))
    chosen = []
    for _ in range(count):
        chosen.append(choice)
        # (G, 1, D); its row of distances is made now, and it can't be chosen again.
        point = points.gather(1, choice[:, None, None].expand(-1, 1, points.shape[-1]))
        distance = (1 - (points @ point.transpose(1, 2)).squeeze(-1)) * weight
        # Minus infinity, so that it is never chosen again.
        nearest = torch.minimum(nearest, distance).scatter(1, choice[:, None], float("-inf"))
        choice = nearest.argmax(dim=1)
    return torch.stack(chosen, dim=1)


def _distance_to_nearest(points: Tensor, weight: Tensor) -> Tensor:
    """Second smallest distance (G, n) to each point; the smallest is its own."""
    groups, count, _ = points.shape
    block = max(1, BLOCK_ELEMENTS // (groups * count))
    found = []
    for start in range(0, count, block):
        columns = slice(start, start + block)
        # (G, n, block) from all points to the block's
        distance = (1 - points @ points[:, columns].transpose(1, 2)) * weight[:, None, columns]
        found.append(distance.topk(min(2, count), dim=1, largest=False).values[:, -1])
    return torch.cat(found, dim=1)
