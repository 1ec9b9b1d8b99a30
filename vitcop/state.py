"""State of one forward through a pruned model: made when it begins, dropped when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vitcop.budget import Geometry, Plan
from vitcop.errors import UnsupportedInputError
from vitcop.layout import CacheLayout
from vitcop.selection import Selection, take, true_indices


@dataclass
class Sequence:
    """The prompt on its way through the layers: what of it is left, and where the visual tokens are.

    Attributes:
        visual: (B, K) positions of visual tokens in the sequence, ascending.
        index: (B, K) their numbers within the clip.
        labels: (B, K) or None.
        valid: (B, S) bool or None, False at padding.
        after: (B,) tokens after the video, which stay.
        rotary: of the tokens left; None until a layer has been pruned.
        mask: attention mask of the current stage; made when first needed.
    """

    visual: Tensor
    index: Tensor
    labels: Tensor | None
    valid: Tensor | None
    after: Tensor
    deepstack: tuple[Tensor, ...]
    length: int
    rotary: tuple[Tensor, Tensor] | None = None
    mask: Any = None

    def keep(self, selection: Selection) -> Tensor:
        """Shrink to the selection; return the (B, S') positions of the sequence that stay."""
        batch, count = self.visual.shape
        alive = torch.ones(batch, self.length, dtype=torch.bool, device=self.visual.device)
        alive.scatter_(1, self.visual, False).scatter_(1, take(self.visual, selection.keep), True)
        self.length += selection.keep.shape[1] - count
        positions = true_indices(alive, self.length)
        place = alive.long().cumsum(1) - 1
        self.visual = place.gather(1, take(self.visual, selection.keep))
        self.index = take(self.index, selection.keep)
        if self.labels is not None:
            self.labels = take(self.labels, selection.keep)
        self.valid = None if self.valid is None else take(self.valid, positions)
        self.deepstack = tuple(take(side, selection.keep) for side in self.deepstack)
        return positions


@dataclass
class Prefill:
    """State of one prefill: made when it begins, dropped when it ends.

    Attributes:
        seen: tokens of the unpruned prompt.
        keeps_cache: whether the caller gets the cache (`use_cache`); pruning needs one either way.
        sequence: None at retention 1, where nothing is changed.
        kept_index: see PrefillRecord.
        layout: of the cache being filled.
        previous_hidden, embeds, embeds_visual: see LayerTokens.
    """

    plan: Plan
    geometry: Geometry
    batch: int
    seen: int
    keeps_cache: bool
    cache: Cache | None = None
    sequence: Sequence | None = None
    layout: CacheLayout | None = None
    kept_index: dict[str, Tensor] = field(default_factory=dict)
    previous_hidden: Tensor | None = None
    embeds: Tensor | None = None
    embeds_visual: Tensor | None = None


@dataclass
class Continuation:
    """State of a forward that goes on from a pruned cache: the masks of its stages."""

    cache: Cache
    layout: CacheLayout
    masks: dict[int, Any]


def put(tokens: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Copy of `tokens` (B, S, D) with `values` (B, K, D) at the positions `where` (B, K)."""
    index = where[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.scatter(1, index, values.to(tokens.dtype).expand(*where.shape, -1))


def add(tokens: Tensor, where: Tensor, values: Tensor) -> Tensor:
    return put(tokens, where, take(tokens, where) + values.to(tokens.dtype))


def slice_positions(position_ids: Tensor, positions: Tensor) -> Tensor:
    """Position ids (..., B or 1, S) of the tokens at `positions` (B, S') -> (..., B, S')."""
    batch, length = positions.shape
    full = position_ids.expand(*position_ids.shape[:-2], batch, position_ids.shape[-1])
    return full.gather(-1, positions.expand(*full.shape[:-2], batch, length))


def compact_positions(position_ids: Tensor, valid: Tensor | None) -> Tensor:
    """Positions (B, S) of the same tokens, numbered from 0; padding counts for nothing."""
    if position_ids.dim() != 2:
        raise UnsupportedInputError("positions='compact' needs one-dimensional positions; this model uses M-RoPE")
    if valid is None:
        return torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)
