"""`Selection`, a method's decision which tokens stay, and the functions that apply one to tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MergeRule = Literal["authors", "mean"]

ROWS = 4096
"""Tokens that are merged at a time, so that no float32 copy of all of them exists."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of V tokens survive a stage, and where the others go.

    Attributes:
        keep: (B, K) int64, ascending indices into the V tokens that entered the stage.
        merge_into: (B, V) int64 or None. Entry j is the slot in `keep` (0 to K - 1) whose token absorbs token j,
            or -1 when token j takes no part in a merge. A slot's own token must name its slot to be part of the mean.
        merge: how a slot with a group is filled: "mean" is the mean of the group; "authors" is ViTCoP's published
            rule, the slot's own token plus the mean of the group.
        features: (B, K, D) or None. Finished features of the kept tokens, for methods whose merge is no plain mean.
        mass_into: (B, V) int64 or None. As `merge_into`, for the mass of token j alone: the number of tokens it stands
            for goes to that slot. By default it goes where the token is merged.
        labels: (B, K) or None. A label for each kept token that a later stage of the same method needs.
    """

    keep: Tensor
    merge_into: Tensor | None = None
    merge: MergeRule = "mean"
    features: Tensor | None = None
    mass_into: Tensor | None = None
    labels: Tensor | None = None


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather `tokens` (B, V, ...) at `index` (B, K) along the token axis -> (B, K, ...)."""
    # Whole rows by one index each: far faster on a CPU than a gather, which indexes every element.
    return tokens[torch.arange(len(index), device=index.device)[:, None], index]


def apply_selection(selection: Selection, tokens: Tensor) -> Tensor:
    """Return the K surviving tokens (B, K, D) of `tokens` (B, V, D), merged as the selection says."""
    if selection.features is not None:
        return selection.features.to(tokens.dtype)
    kept = take(tokens, selection.keep)
    if selection.merge_into is None:
        return kept
    return _merge(kept, tokens, selection.merge_into, selection.merge)


def kept_mass(selection: Selection, mass: Tensor) -> Tensor:
    """How many tokens (B, K) each kept token stands for, from those (B, V) that each one stood for before."""
    kept = take(mass, selection.keep)
    # (B, V) slot of each token: where its mass goes, else where it is merged
    into = selection.merge_into if selection.mass_into is None else selection.mass_into
    if into is None:
        # A kept token that nothing was assigned to, not even itself, still stands for what it stood for.
        return kept
    # Slot K collects what goes nowhere; it is cut off again.
    slot = torch.where(into < 0, kept.shape[1], into)
    total = mass.new_zeros(len(mass), kept.shape[1] + 1).scatter_add_(1, slot, mass)[:, :-1]
    return torch.where(total > 0, total, kept)


def _merge(kept: Tensor, tokens: Tensor, merge_into: Tensor, rule: MergeRule) -> Tensor:
    batch, slots, dim = kept.shape
    # Slot `slots` collects the tokens that take no part; it is cut off again.
    slot = torch.where(merge_into < 0, slots, merge_into)
    # (B, K + 1) members of each slot
    count = torch.zeros(batch, slots + 1, dtype=torch.float32, device=kept.device)
    count.scatter_add_(1, slot, torch.ones_like(slot, dtype=torch.float32))
    # (B, V) row of the flat sums (B * (slots + 1), D) that each token is added to
    row = slot + torch.arange(batch, device=slot.device)[:, None] * (slots + 1)
    total = torch.zeros(batch * (slots + 1), dim, dtype=torch.float32, device=kept.device)
    # Sums are float32 whatever the model's dtype; only `ROWS` tokens are copied to it at a time.
    for rows, part in zip(row.flatten().split(ROWS), tokens.flatten(0, 1).split(ROWS), strict=True):
        total.index_add_(0, rows, part.float())
    total, count = total.unflatten(0, (batch, -1))[:, :slots], count[:, :slots, None]
    mean = total.div_(count.clamp(min=1))  # zero where nothing merges
    merged = mean.add_(kept) if rule == "authors" else torch.where(count > 0, mean, kept.float())
    return merged.to(kept.dtype)


def top_k_in_order(score: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the `count` largest scores along the last axis, ascending; ties go to the lower index."""
    # A stable sort, not `topk`, which leaves the order of equal scores to the device.
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return best.sort(dim=-1).values


def true_indices(mask: Tensor, count: int) -> Tensor:
    """Ascending indices (B, count) of the True entries of `mask` (B, V), each row of which has exactly `count`.

    The count is known on the host, so nothing has to be read back from the device.
    """
    return (~mask).to(torch.int8).argsort(dim=-1, stable=True)[..., :count]
