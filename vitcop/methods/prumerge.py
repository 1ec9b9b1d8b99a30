"""LLaVA-PruMerge (ICCV 2025, arXiv 2403.15388): centres that take in their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel, required
from vitcop.ops.quotas import best_of_frame, even_quota_sum, even_quotas, keep_mask
from vitcop.ops.similarity import unit
from vitcop.selection import Selection
from vitcop.tokens import Needs, VisualTokens

NEIGHBOURS = 32


@dataclass(frozen=True, kw_only=True)
class PruMerge(BeforeModel):
    """Keep tokens of most attention and evenly spaced ones, each plus its neighbours; one more token takes the rest.

    A centre becomes itself plus the sum of attention times feature over the 32 tokens of its frame whose keys are most
    like its own. One more token is the sum of attention times feature over all tokens that are no centre.
    Question-blind.

    Deviations: the published count is the share of attention outliers and can't follow a budget; here a clip's total
    is spread evenly over frames. The published "plus" variant adds every s-th token, about three for each salient one;
    here a quarter of the centres is salient and the rest evenly spaced among the others, so that counts are exact. The
    token of the rest stands where the token of most attention among them stood, and frames of one token have none.
    Attention (in encoders without a CLS token the mean received) is scaled to add up to 1 over a frame's tokens, and
    merging happens on projected tokens. Tokens keep their original order and positions.

    Attributes:
        salient_share: centres that are chosen by attention; 1 is the published variant without "plus".
    """

    name: ClassVar[str] = "prumerge"
    frame_local: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(attention=True, keys=True)

    salient_share: float = 0.25
    neighbours: int = NEIGHBOURS

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        attention, keys = required(tokens.attention, "attention"), required(tokens.keys, "keys")
        span = (tokens.first_frame, tokens.first_frame + tokens.frames)
        quota = even_quotas(plan.entering, geometry.frames, keys.device, *span).expand(attention.shape[:2])
        # In frames that keep more than one token, one of them becomes the weighted sum of all that are no centres.
        gathers = (quota > 1).long()
        centres = choose_centres(attention, quota - gathers, self.salient_share)
        # (B, F, N) share of the frame's attention
        weight = attention / attention.sum(dim=2, keepdim=True)
        merged, rest = take_in_neighbours(tokens.features, keys, weight, centres, self.neighbours)
        # It stands where the most salient token stands that is no centre.
        gatherer = best_of_frame(attention.masked_fill(centres, float("-inf")), gathers)
        features = torch.where(gatherer[..., None], rest[:, :, None], merged)
        count = even_quota_sum(plan.entering, geometry.frames, *span)
        return keep_mask((centres | gatherer).flatten(1), count, features.flatten(1, 2))


def choose_centres(attention: Tensor, quota: Tensor, salient_share: float) -> Tensor:
    """Mask (B, F, N) of `quota` (B, F) tokens a frame: the salient ones, and evenly spaced ones of the others."""
    salient_quota = (quota * salient_share).ceil().long()
    salient = best_of_frame(attention, salient_quota)
    # (B, F, 1) tokens that are not salient, and how many of them are wanted
    others = (attention.shape[2] - salient_quota).clamp(min=1)[..., None]
    wanted = (quota - salient_quota)[..., None]
    # (B, F, N) number, from 1, of each token among the others
    place = (~salient).long().cumsum(dim=2)
    # A token is taken wherever place * wanted / others reaches the next whole number.
    return salient | (~salient & (place * wanted // others > (place - 1) * wanted // others))


def take_in_neighbours(
    features: Tensor, keys: Tensor, weight: Tensor, centres: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Add to each token its neighbours, and add up what is no centre.

    Args:
        features, keys: (B, F, N, D) and (B, F, N, d).
        weight: (B, F, N) of each token when it is added to another.
        centres: (B, F, N) bool.

    Returns:
        Every token plus its weighted neighbours (B, F, N, D), and the weighted sum of non-centres (B, F, D), float32.
    """
    features, direction = features.float(), unit(keys)
    # (B, F, N, N); a token is no neighbour of its own
    likeness = direction @ direction.transpose(2, 3)
    itself = torch.eye(likeness.shape[2], dtype=torch.bool, device=likeness.device)
    likeness = likeness.masked_fill(itself, float("-inf"))
    nearest = likeness.topk(min(neighbours, likeness.shape[2] - 1), dim=3).indices
    # (B, F, N, N) weight with which row i takes in token j
    taken = torch.zeros_like(likeness).scatter_(3, nearest, 1) * weight[:, :, None]
    rest = (weight * ~centres)[:, :, None] @ features
    return features + taken @ features, rest.squeeze(2)
