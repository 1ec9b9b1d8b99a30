"""Tango (arXiv 2604.09547): salient tokens from clusters, the rest of each segment merged into its dense tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.base import check_shares
from vitcop.methods.before import BeforeModel, required
from vitcop.ops.clustering import pairwise_distance
from vitcop.ops.density import peaks_in_parts
from vitcop.ops.quotas import meet_count, rank_in_parts
from vitcop.ops.rotation import ST_BASE, rotate_by_position
from vitcop.ops.segments import split_at_changes
from vitcop.ops.similarity import similarity_to_previous
from vitcop.selection import Selection, apply_selection, take, true_indices
from vitcop.tokens import Needs, VisualTokens

SINKS = (11, 12, 27, 28, 41, 169)
"""Places of a 14 x 14 grid that a SigLIP tower attends to whatever they show."""
NEIGHBOURS = 7


@dataclass(frozen=True, kw_only=True)
class Tango(BeforeModel):
    """Cut the clip into segments; keep salient tokens of each that differ, and merge the rest into context tokens.

    Of a segment's tokens the ratio r stays, rounded up. The share `1 - context_share` of these is salient: of 1.5 times
    as many tokens of most attention, density peaks (DPC-kNN) make as many clusters as are kept, and each gives its
    token of most attention. The others are context: density peaks of what is left, each averaged with those nearest to
    it, with a weight of at least `beta` for itself. Distances are between features that a rotary encoding of frame,
    row and column (ST-RoPE) turns, so that they grow with the distance in the clip. Question-blind.

    Written from the formula, without recorded vectors. Deviations: segments are those of FastVID at Tango's threshold,
    by mean frame tokens; attention is that of the layer that feeds the projector; no noise on densities; the rounded
    counts drift from the total, and tokens of lowest attention are dropped until it is exact. Sinks are left out on
    14 x 14 grids only. Takes V x V distances, 157 MB at 32 frames of 196 tokens.

    Attributes:
        threshold: similarity of frames below which a segment ends.
        candidates: tokens of most attention that are clustered, for each salient one.
    """

    name: ClassVar[str] = "tango"
    needs: ClassVar[Needs] = Needs(attention=True)

    threshold: float = 0.65
    context_share: float = 0.4
    candidates: float = 1.5
    beta: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "threshold", "context_share", "beta")
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        attention = without_sinks(required(tokens.attention, "attention"), tokens).flatten(1)
        similarity = similarity_to_previous(tokens.features.float().mean(dim=2))
        segments = split_at_changes(similarity, self.threshold, least=1)
        per_frame = tokens.features.shape[2]
        part = segments.first.repeat_interleave(per_frame, dim=1)
        size = segments.length.repeat_interleave(per_frame, dim=1) * per_frame
        # (B, V) tokens that each one's segment keeps
        quota = (size.double() * (plan.entering / geometry.num_tokens)).ceil().long()
        context_quota = (quota * self.context_share).long()

        rotated = rotate_by_position(tokens.features, tokens.height, tokens.width, ST_BASE).flatten(1, 2)
        distance = pairwise_distance(rotated) / rotated.shape[-1] ** 0.5
        salient = self._salient(distance, attention, part, quota - context_quota)
        score = peaks_in_parts(distance, ~salient, part, NEIGHBOURS)
        anchors = (rank_in_parts(score, part) < context_quota) & ~salient
        mask = meet_count(salient | anchors, attention, plan.entering)
        keep = true_indices(mask, plan.entering)
        anchors &= mask  # those that the exact total leaves
        anchor = nearest_of(distance, anchors, part)
        return merge_into_anchors(keep, anchor, ~mask & ~salient, tokens.features.flatten(1, 2), self.beta)

    def _salient(self, distance: Tensor, attention: Tensor, part: Tensor, quota: Tensor) -> Tensor:
        """Mask (B, V) of the tokens of most attention in each cluster of candidates."""
        candidate = rank_in_parts(attention, part) < (quota * self.candidates).ceil()
        score = peaks_in_parts(distance, candidate, part, NEIGHBOURS)
        centre = (rank_in_parts(score, part) < quota) & candidate
        nowhere = torch.full_like(part, part.shape[1])
        cluster = torch.where(candidate, nearest_of(distance, centre, part), nowhere)
        return (rank_in_parts(attention, cluster) == 0) & candidate


def merge_into_anchors(keep: Tensor, anchor: Tensor, merged: Tensor, features: Tensor, beta: float) -> Selection:
    """Average the `merged` tokens of (B, V, D) into those that they are nearest to.

    Args:
        keep: (B, K) tokens kept.
        anchor: (B, V) index of the kept token that each one is nearest to; V where there is none.
        beta: least weight of the kept token itself; with m merged ones it is 1 / (m + 1) if that is more.
    """
    batch, count = anchor.shape
    # (B, V + 1) place of each token among those kept; -1 elsewhere, and for "none", which is token V
    slot = torch.full((batch, count + 1), -1, device=anchor.device)
    slot.scatter_(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
    into = torch.where(merged, slot.gather(1, anchor), -1)
    others = apply_selection(Selection(keep=keep, merge_into=into), features.float())
    # (B, V + 1) merged tokens of each anchor; those that are not merged count for V
    members = torch.zeros_like(slot).scatter_add_(1, torch.where(merged, anchor, count), torch.ones_like(anchor))
    weight = (1 / (1 + take(members, keep))).clamp(min=beta)[..., None]
    blended = weight * take(features, keep).float() + (1 - weight) * others
    return Selection(keep=keep, features=blended)


def without_sinks(attention: Tensor, tokens: VisualTokens) -> Tensor:
    """Attention (B, F, N) that is 0 at the sinks of a 14 x 14 grid."""
    if (tokens.height, tokens.width) != (14, 14):
        return attention
    place = torch.arange(14 * 14, device=attention.device)
    sinks = torch.zeros_like(place, dtype=torch.bool)
    for sink in SINKS:
        sinks |= place == sink
    return attention.masked_fill(sinks, 0)


def nearest_of(distance: Tensor, centres: Tensor, part: Tensor) -> Tensor:
    """Index (B, V) of the nearest centre (B, V) of the same part; V where the part has none. A centre is its own."""
    seen = centres[:, None] & (part[:, :, None] == part[:, None])
    nearest = distance.masked_fill(~seen, torch.inf).min(dim=2)
    own = torch.arange(part.shape[1], device=part.device).expand_as(part)
    index = torch.where(centres, own, nearest.indices)
    return torch.where(nearest.values.isinf(), part.shape[1], index)
