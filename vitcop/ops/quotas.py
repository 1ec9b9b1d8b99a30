"""Token counts a frame, and exact totals, for methods that choose before the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from vitcop.selection import Selection, true_indices


def spread(count: int, frames: int) -> list[int]:
    """`count` tokens spread evenly over `frames` frames; with fewer tokens than frames, some get none."""
    # Differences of rounded-down shares: they add up to `count` and differ by 1 at most.
    return [(frame + 1) * count // frames - frame * count // frames for frame in range(frames)]


def even_quotas(count: int, frames: int, device: torch.device, first: int = 0, end: int | None = None) -> Tensor:
    """Tokens (end - first,) of the frames [first, end) when `count` tokens are spread evenly over `frames` frames."""
    return torch.tensor(spread(count, frames)[first:end], device=device)


def even_quota_sum(count: int, frames: int, first: int, end: int) -> int:
    """The sum of `even_quotas`, computed on the host."""
    return sum(spread(count, frames)[first:end])


def rank(score: Tensor) -> Tensor:
    """Place (..., n) of each entry along the last axis by falling score, from 0; ties go to the lower index."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def rank_in_parts(score: Tensor, part: Tensor) -> Tensor:
    """Place (B, V) of each entry among those of its part (B, V) by falling score, from 0; ties go to the lower index.

    Args:
        part: numbers in [0, V].
    """
    by_score = score.argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, part.gather(1, by_score).argsort(dim=1, stable=True))
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    # In this order a part's first entry stands after all those of the parts before it.
    size = part.new_zeros(len(part), part.shape[1] + 1).scatter_add_(1, part, torch.ones_like(part))
    start = (size.cumsum(dim=1) - size).gather(1, part)
    return torch.empty_like(order).scatter_(1, order, place) - start


def best_of_frame(score: Tensor, quota: Tensor | int) -> Tensor:
    """Mask (B, F, N) of each frame's `quota` (B, F) tokens of highest score (B, F, N)."""
    return rank(score) < (quota[..., None] if isinstance(quota, Tensor) else quota)


def meet_count(mask: Tensor, score: Tensor, count: int) -> Tensor:
    """Change as little of `mask` (B, V) as makes exactly `count` entries True.

    Where too many are True, those of lowest score (B, V) are dropped; where too few, those of highest score are added.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    # True entries first, each group still by falling score, so the first `count` are the answer.
    order = order.gather(1, (~mask.gather(1, order)).to(torch.int8).argsort(dim=1, stable=True))
    return torch.zeros_like(mask).scatter_(1, order[:, :count], True)


def keep_mask(mask: Tensor, count: int, features: Tensor | None = None) -> Selection:
    """The selection of the `count` True tokens of `mask` (B, V); `features` (B, V, D) are the finished tokens."""
    keep = true_indices(mask, count)
    if features is None:
        return Selection(keep=keep)
    return Selection(keep=keep, features=features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1])))
