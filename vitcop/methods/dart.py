"""DART (arXiv 2502.11494): keep what differs most from a few pivots, instead of what matters most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.base import check_at_least_one
from vitcop.methods.inside import OneLayer
from vitcop.ops.similarity import unit
from vitcop.selection import Selection, take, true_indices
from vitcop.tokens import LayerTokens


@dataclass(frozen=True, kw_only=True)
class DART(OneLayer):
    """Before layer K, keep the visual tokens least similar to pivots: the tokens of largest L1 key norm.

    Pivots are some visual tokens, which are kept, and some tokens of the question, which only steer the choice. One
    pivot after another takes its share of the visual tokens left, those of lowest cosine similarity to it; hidden
    states are compared under the model's final norm, key norms are of layer K - 1. Source: Duplication-aware token
    reduction, as in LightCompress; K = 2. Question-aware through the text pivots.

    Deviations: pivots take their turn in order of norm, visual ones first (the published order is that of a Python
    set, which is arbitrary); shares add up to the budget exactly. A question shorter than the number of text pivots
    repeats its strongest one. Positions stay the original ones, as published.

    Attributes:
        pivot_image_tokens, pivot_text_tokens: number of pivots of each kind.
    """

    name: ClassVar[str] = "dart"
    query_aware: ClassVar[bool] = True

    pivot_image_tokens: int = 4
    pivot_text_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "pivot_image_tokens", "pivot_text_tokens")

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        count = plan.layers[tokens.layer]
        visual, text = self.pivots(tokens)
        # A budget below the number of pivots keeps the first of them and nothing else.
        visual = visual[:, :count]
        # (B, P) positions of all pivots in the sequence, visual ones first
        places = torch.cat([take(tokens.visual, visual), text], dim=1)
        # Shares add up to what the pivots themselves leave; the first pivots take one more.
        each, extra = divmod(count - visual.shape[1], places.shape[1])
        shares = [each + (turn < extra) for turn in range(places.shape[1])]
        return Selection(keep=take_least_similar(tokens, visual, places, shares))

    def pivots(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        """Indices among the visual tokens (B, pi), and positions of text tokens (B, pt), of largest L1 key norm."""
        # (B, S) L1 norm of each token's cached key, over all key heads
        norm = tokens.previous_keys.float().abs().sum(dim=(1, 3))
        visual = norm.gather(1, tokens.visual).argsort(dim=1, descending=True, stable=True)
        text = norm.masked_fill(~tokens.question, -1).argsort(dim=1, descending=True, stable=True)
        text = text[:, : self.pivot_text_tokens]
        # Of a question with fewer tokens the strongest one is repeated, so that shapes don't depend on the text.
        text = torch.where(tokens.question.gather(1, text), text, text[:, :1])
        return visual[:, : self.pivot_image_tokens], text


def take_least_similar(tokens: LayerTokens, chosen: Tensor, pivots: Tensor, shares: Sequence[int]) -> Tensor:
    """Add to the visual tokens `chosen` (B, c) what each pivot in turn takes: the least similar ones left.

    Args:
        pivots: (B, P) positions in the sequence, in the order of their turns.
        shares: how many visual tokens each pivot takes.

    Returns:
        (B, c + sum(shares)) ascending indices among the visual tokens.
    """
    # (B, K, D) visual tokens and (B, P, D) pivots, both under the final norm
    points = unit(tokens.language.final_norm(tokens.features))
    centres = unit(tokens.language.final_norm(take(tokens.hidden, pivots)))
    similarity = centres @ points.transpose(1, 2)
    taken = torch.zeros_like(tokens.visual, dtype=torch.bool).scatter_(1, chosen, True)
    # A token that is taken already sorts last, so no later pivot takes it again.
    for turn, share in enumerate(shares):
        order = similarity[:, turn].masked_fill(taken, float("inf")).argsort(dim=1, stable=True)
        taken.scatter_(1, order[:, :share], True)
    return true_indices(taken, chosen.shape[1] + sum(shares))
