"""Weighted farthest points: tokens that are important and far from each other, and what lies nearest to each."""

from __future__ import annotations

import torch
from torch import Tensor

from vitcop.selection import take

WINDOW = 4096
"""Most tokens among which points are chosen together; longer sequences are cut into windows of equal length."""
MATRIX_ELEMENTS = 1 << 26
"""Largest block of a distance matrix, in elements: 256 MiB in float32."""


def farthest_points(points: Tensor, weight: Tensor, count: int, window: int = WINDOW) -> Tensor:
    """Choose points greedily, each important and far from those chosen before it.

    The first is the largest `w_j |p_j|^2`, each further one the largest `w_j min_i |p_i - p_j|^2` over the chosen i. A
    chosen point is never chosen again, and ties go to the lowest index. With more than `window` points, each of
    several runs of consecutive points gives an equal share of `count`; the runs are worked on side by side.

    All distances of a window are one matrix product, so that a step of the greedy reads one row of it: three kernels
    and 16 bytes a point (the row, and the distances to the nearest chosen point read, written and searched), where
    computing the row would read 4 D bytes a point. With V points there are `count / windows` steps, whose number the
    host knows, `V * min(V, window) * D` multiply-adds, and at most `MATRIX_ELEMENTS` distances at a time (or one
    window's). Nothing is read back from the device, so the loop can be captured in a CUDA graph.

    Args:
        points: (B, V, D) float32.
        weight: (B, V), positive.
        count: points to choose, at most V.

    Returns:
        (B, count) indices, ascending.
    """
    # (W, n) places of each window, and which of them exist: the first windows may have one point more.
    index, present = _windows(points.shape[1], window, points.device)
    # As many windows side by side as the largest block of distances allows.
    at_once = max(1, MATRIX_ELEMENTS // (len(points) * index.shape[1] ** 2))
    # Each window gives an equal share, some windows side by side.
    steps = -(-count // len(index))
    chosen = []
    # (B * windows, n, D) and (B * windows, n): windows of all clips are one batch
    for places, there in zip(index.split(at_once), present.split(at_once), strict=True):
        # (B, windows * n) indices of these windows' points
        flat = places.flatten().expand(len(points), -1)
        shape = (len(points) * len(places), places.shape[1])
        order = _choose(
            take(points, flat).view(*shape, -1),
            take(weight, flat).view(shape),
            there.expand(len(points), -1, -1).reshape(shape),
            steps,
        )
        # (B, windows, steps) places within the clip, from places within the window
        chosen.append(places.expand(len(points), -1, -1).gather(2, order.view(len(points), len(places), steps)))
    # One more than their share falls to the first windows, which are also those with one more point.
    return torch.cat(chosen, dim=1).transpose(1, 2).flatten(1)[:, :count].sort(dim=1).values


def nearest_point(points: Tensor, keep: Tensor) -> Tensor:
    """For each of the points (B, V, D) the slot (B, V) in `keep` (B, K) of the nearest kept one.

    A kept point has its own slot, and ties go to the lowest. Worked on in blocks of points, to bound the memory.
    """
    centres = take(points, keep)
    # The nearest c has the least |c|^2 / 2 - pc: that is |p - c|^2 / 2 less |p|^2 / 2, the same for all c.
    half_square = centres.square().sum(dim=-1)[:, None] / 2
    block = max(1, MATRIX_ELEMENTS // (len(points) * keep.shape[1]))
    nearest = [(half_square - part @ centres.transpose(1, 2)).argmin(dim=2) for part in points.split(block, dim=1)]
    # Set by hand: rounding could put a kept point nearer to its double.
    own = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return torch.cat(nearest, dim=1).scatter(1, keep, own)


def _windows(length: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices (W, n) of equal runs of `length` points, at most `most` long, and which of them are there (the first
    runs may have one point more than the others).
    """
    number = -(-length // most)
    least, longer = divmod(length, number)
    run = torch.arange(number, device=device)[:, None]
    place = torch.arange(-(-length // number), device=device)
    index = run * least + run.clamp(max=longer) + place
    return index.clamp(max=length - 1), place < least + (run < longer).long()


def _choose(points: Tensor, weight: Tensor, present: Tensor, steps: int) -> Tensor:
    """The greedy on (G, n, D) points, of which only those `present` (G, n) can be chosen: (G, steps) in order."""
    rows = torch.arange(len(points), device=points.device)
    square = points.square().sum(dim=-1)
    # (G, n, n) weighted squared distance from i to j; below zero only for what must not be chosen (again).
    distance = torch.baddbmm(square[:, None], points, points.transpose(1, 2), alpha=-2)
    distance.add_(square[..., None]).clamp_(min=0).mul_(weight[:, None])
    distance.diagonal(dim1=1, dim2=2).fill_(-1)
    nearest = torch.where(present, torch.inf, -1.0)
    choice = torch.where(present, weight * square, -1.0).argmax(dim=1)
    chosen = [choice]
    for _ in range(steps - 1):
        nearest = torch.minimum(nearest, distance[rows, choice])
        choice = nearest.argmax(dim=1)
        chosen.append(choice)
    return torch.stack(chosen, dim=1)
