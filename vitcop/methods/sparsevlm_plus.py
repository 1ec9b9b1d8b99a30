"""SparseVLM, version 2.0 of the code: some heads only, their attention freed from distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.sparsevlm import SparseVLM, rater_attention, raters, sum_of
from vitcop.selection import Selection, take, top_k_in_order
from vitcop.tokens import LayerTokens

LEAST_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM's raters, layers and counts, a score from the heads that look at the picture most, and no merging.

    Each attention weight is divided by what rotary embedding alone makes of two equal vectors at that distance. The
    heads with the largest sums over raters and visual tokens are averaged. Question-aware. Positions stay the
    original ones, as published.

    Deviations: the authors fix 14 heads of 32; here that share of the model's heads. The divisor is kept from zero.

    Attributes:
        heads: number of heads averaged.
    """

    name: ClassVar[str] = "sparsevlm_plus"

    heads: int | None = None

    def least(self, entering: int) -> int:
        return 1

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        rater = raters(tokens)
        total = head_totals(tokens, rater)
        heads = best_heads(total, self.heads or max(1, round(total.shape[1] * 14 / 32)))
        score = mean_of_heads(total, heads, rater)
        return Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))


def head_totals(tokens: LayerTokens, rater: Tensor) -> Tensor:
    """(B, H, K) attention of each visual token from the `rater` (B, T) rows, freed from distance, added up."""
    return sum_of(
        attention / rotary_weights(tokens, rows)[:, None] for rows, attention in rater_attention(tokens, rater)
    )


def best_heads(total: Tensor, count: int) -> Tensor:
    """The `count` heads (B, count) with the largest sums over the visual tokens of `total` (B, H, K), ascending."""
    return top_k_in_order(total.sum(dim=2), count)


def mean_of_heads(total: Tensor, heads: Tensor, rater: Tensor) -> Tensor:
    """Score (B, K): the mean of `total` (B, H, K) over `heads` (B, n) and over the raters that were added up."""
    return take(total, heads).mean(dim=1) / rater.sum(dim=1, keepdim=True)


def rotary_weights(tokens: LayerTokens, rows: Tensor) -> Tensor:
    """What rotary embedding makes of a query of ones at `rows` (B, Q) and a key of ones at each visual token: the
    scaled dot products (B, Q, K), kept from zero.
    """
    cos, sin = (part.float() for part in tokens.rotary)
    half = torch.ones_like(cos[..., : cos.shape[-1] // 2])
    # (B, S, d_h) a vector of ones, rotated to each position
    ones = cos + torch.cat((-half, half), dim=-1) * sin
    # (B, Q, K)
    weight = take(ones, rows) @ take(ones, tokens.visual).transpose(1, 2) / cos.shape[-1] ** 0.5
    return torch.where(weight.abs() < LEAST_WEIGHT, LEAST_WEIGHT, weight)
