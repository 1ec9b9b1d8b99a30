"""Density peaks by nearest neighbours (DPC-kNN), batched over groups of points of which some don't count."""

from __future__ import annotations

import torch
from torch import Tensor

from vitcop.ops.clustering import pairwise_distance


def density_peaks(points: Tensor, valid: Tensor, neighbours: Tensor | int, most: int) -> tuple[Tensor, Tensor]:
    """Score how well each point would serve as the centre of a cluster.

    Density is `exp(-mean of the squared distances to the nearest neighbours)`, the point itself among them; the score
    is density times the distance to the nearest denser point, or to the farthest pair's where none is denser.

    Args:
        points: (G, n, D).
        valid: (G, n) bool; the other points don't exist.
        neighbours: how many, a number or (G,), at most `most` and at most as many as there are points.

    Returns:
        Scores (G, n), minus infinity where not valid, and distances (G, n, n), divided by the root of D.
    """
    distance = pairwise_distance(points) / points.shape[-1] ** 0.5
    # (G, n, n) pairs of points that both exist
    pairs = valid[:, :, None] & valid[:, None]
    # (G, 1, 1) neighbours that count in each group: no more than it has points
    number = valid.sum(dim=1).clamp(max=neighbours).clamp(1, most)[:, None, None]
    # (G, n, k) distances to the nearest valid points, of which the first `number` count
    nearest = distance.masked_fill(~pairs, float("inf")).topk(min(most, points.shape[1]), largest=False).values
    # (G, n, most) mask of the neighbours that count
    used = torch.arange(nearest.shape[-1], device=points.device) < number
    # (G, n) density; the points denser than point i are True in row i of (G, n, n)
    density = (-nearest.square().masked_fill(~used, 0).sum(dim=-1) / number[..., 0]).exp()
    denser = (density[:, None] > density[:, :, None]) & pairs
    # The densest point has no denser one: it gets the largest distance.
    farthest = distance.masked_fill(~pairs, 0).amax(dim=(1, 2), keepdim=True)
    gap = torch.where(denser, distance, farthest).amin(dim=-1)
    return (gap * density).masked_fill(~valid, float("-inf")), distance


def gather_members(points: Tensor, nearness: Tensor, centres: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Let each member join the centre nearest to it.

    Args:
        points: (G, m, D) candidates for membership.
        nearness: (G, n, m), larger is nearer.
        centres: (G, n) bool, which of the n points are centres.
        members: (G, m) bool, which candidates join.

    Returns:
        Mean (G, n, D) of those who joined, float32, 0 where there are none, and their number (G, n).
    """
    # (G, m) the centre that each candidate is nearest to
    best = nearness.masked_fill(~centres[..., None], float("-inf")).argmax(dim=1)
    number = torch.arange(centres.shape[1], device=centres.device)[:, None]
    # (G, n, m) 1 where candidate m joins centre n
    joined = (best[:, None] == number) & members[:, None] & centres[..., None]
    count = joined.sum(dim=-1)
    # A product with 0 and 1 adds up in the same order every time, which scattering does not.
    return joined.float() @ points.float() / count.clamp(min=1)[..., None], count


def peaks_in_parts(distance: Tensor, valid: Tensor, part: Tensor, neighbours: int) -> Tensor:
    """The score of `density_peaks` (G, n) where only points of the same part see each other.

    Args:
        distance: (G, n, n).
        valid: (G, n) bool; the other points don't exist, and score minus infinity.
        part: (G, n) number in [0, n) of each point's part.
    """
    pairs = valid[:, :, None] & valid[:, None] & (part[:, :, None] == part[:, None])
    number = pairs.sum(dim=2).clamp(1, neighbours)[..., None]  # (G, n, 1)
    nearest = distance.masked_fill(~pairs, torch.inf).topk(min(neighbours, valid.shape[1]), largest=False).values
    used = torch.arange(nearest.shape[2], device=distance.device) < number
    density = (-nearest.square().masked_fill(~used, 0).sum(dim=2) / number[..., 0]).exp()
    denser = (density[:, None] > density[:, :, None]) & pairs
    # (G, n) the farthest pair of a point's part, for those that none is denser than
    farthest = distance.masked_fill(~pairs, 0).amax(dim=2)
    farthest = torch.zeros_like(farthest).scatter_reduce(1, part, farthest, "amax").gather(1, part)
    gap = torch.where(denser, distance, farthest[..., None]).amin(dim=2)
    return (gap * density).masked_fill(~valid, -torch.inf)
