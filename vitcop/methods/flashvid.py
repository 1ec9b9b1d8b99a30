"""FlashVID (ICLR 2026, arXiv 2602.08024): salient, different tokens and trees of what repeats, and a late stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan, scaled_layers, shares_to_counts, single_stage, solve_stages
from vitcop.methods.base import Proportional, check_shares
from vitcop.methods.before import required
from vitcop.methods.inside import last_token_attention
from vitcop.ops.density import density_peaks, gather_members
from vitcop.ops.farthest_points import nearest_point
from vitcop.ops.quotas import best_of_frame, keep_mask, meet_count
from vitcop.ops.rotation import ST_BASE, rotate_by_position
from vitcop.ops.segments import Segments, split_at_changes
from vitcop.ops.similarity import farthest_directions, similarity_to_previous, unit
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens, Needs, VisualTokens

Diversity = Literal["attention", "attention_and_event"]
NEIGHBOURS = 7
UNLINKED = -1.0
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class FlashVID(Proportional):
    """Pick salient and different tokens of each frame; merge what repeats over time into trees, and these in space.

    Segments as in FastVID. The share `alpha` of a frame's budget goes to tokens chosen greedily for their distance
    from those chosen, times their attention, times (by default) their likeness to the segment's mean token (ADTS).
    Every other token is linked to the one most like it in the frame before, if more than `temporal_threshold`, and
    added to it from the last frame to the first; roots are divided by one plus their direct children (TSTM). The
    roots of each frame are clustered (DPC-kNN) to what is left of the segment's budget. Before a late layer, the share
    `inner_share` of all that is kept by the attention of the prompt's last token in the layer before; this part is
    question-aware.

    Deviations: the late layer follows the model's depth, and the budget before the model is solved for the ratio (at
    the published 20 of 28 layers, the published 1.25-fold); no noise on densities; a token is chosen once where the
    authors may choose it again; the authors round up frame by frame, and here the tokens of lowest attention are
    dropped, or those of next highest added, until the total is exact. Positions stay the original ones. Encoders
    without a CLS token give the mean attention received, as in the authors' code. With a `bias`, a token counts for the
    kept one of highest cosine.

    Attributes:
        diversity: whether ADTS weighs distances by attention alone or by likeness to the segment, too.
        layer: the layer before which the late stage runs; by default at the depth of layer 20 of 28.
        inner_share: tokens left after it for each one before; 1 leaves it out.
        st_rope: ADTS measures distances between features turned by Tango's ST-RoPE.
    """

    name: ClassVar[str] = "flashvid"
    query_aware: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(attention=True, previous_hidden=True)

    diversity: Diversity = "attention_and_event"
    alpha: float = 0.7
    temporal_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 8
    layer: int | None = None
    inner_share: float = 0.3
    st_rope: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diversity not in ("attention", "attention_and_event"):
            raise ValueError(f"diversity must be 'attention' or 'attention_and_event', got {self.diversity!r}")
        check_shares(self, "alpha", "inner_share")

    def plan(self, geometry: Geometry) -> Plan:
        if self.inner_share == 1:
            return single_stage(geometry, self.retention_ratio)
        layers = scaled_layers([20], geometry.num_layers, 28) if self.layer is None else (self.layer,)

        def counts(scale: float) -> list[int]:
            return shares_to_counts(geometry.num_tokens, [min(1.0, scale / self.inner_share), scale])

        return solve_stages(geometry, self.retention_ratio, layers, counts, before_model=True)

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        attention = required(tokens.attention, "attention")
        segments = self.segments(tokens.features)
        per_frame = math.ceil(plan.entering / geometry.frames)
        rotated = rotate_by_position(tokens.features, tokens.height, tokens.width, ST_BASE) if self.st_rope else None
        picked, roots, merged = self.choose(tokens.features, attention, segments, per_frame, rotated)
        # Picks keep their own features; trees and clusters of the others are means.
        features = torch.where(picked[..., None], tokens.features.float(), merged)
        mask = meet_count((picked | roots).flatten(1), attention.flatten(1), plan.entering)
        return self._with_mass(keep_mask(mask, plan.entering, features.flatten(1, 2)), tokens.features.flatten(1, 2))

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        score = last_token_attention(tokens, own_layer=False)
        selection = Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))
        return self._with_mass(selection, tokens.features)

    def _with_mass(self, selection: Selection, features: Tensor) -> Selection:
        """Where there is a bias, each token (B, V, D) counts for the kept one of highest cosine."""
        if not self.bias:
            return selection
        return replace(selection, mass_into=nearest_point(unit(features), selection.keep))

    def segments(self, features: Tensor) -> Segments:
        similarity = similarity_to_previous(features.float().mean(dim=2))
        return split_at_changes(similarity, self.segment_threshold, self.min_segments)

    def choose(
        self,
        features: Tensor,
        attention: Tensor,
        segments: Segments,
        per_frame: int,
        rotated: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (B, F, N) of the ADTS picks and of the TSTM centres, and merged features (B, F, N, D), float32.

        With features `rotated` by their place, ADTS measures distances between these.

        In a segment of one frame, centres are found among all tokens, so that one may be a pick, too.
        """
        features, picks = features.float(), math.ceil(per_frame * self.alpha)
        # (B, F, N) weight of a token's distance from those chosen
        weight = attention.float()
        if self.diversity == "attention_and_event":
            weight = weight * (features * segments.mean(features.mean(dim=2))[:, :, None]).sum(dim=-1)
        # ADTS: (B * F, picks), frame by frame
        points = unit(features if rotated is None else rotated)
        chosen = farthest_directions(points.flatten(0, 1), picks, weight.flatten(0, 1))
        # (B, F, N) from (B * F, picks) indices, frame by frame
        picked = torch.zeros_like(weight).bool().flatten(0, 1).scatter_(1, chosen, True).view_as(weight)
        # TSTM: what repeats is added to its parent a frame earlier, and the roots are clustered.
        alone = (segments.length == 1)[..., None]
        strength, parent = link_to_previous(features, ~picked, segments)
        linked = strong_links(strength, segments, self.temporal_threshold, attention.shape[2] - per_frame)
        # (B, F, N, D) each root with what was added to it
        trees = sum_trees(features, linked, parent)
        roots = ~linked & (~picked | alone)
        return picked, *cluster_roots(trees, roots, segments, per_frame - picks)


def link_to_previous(features: Tensor, free: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Cosine (B, F, N) of each free token with the most similar free one a frame earlier in its segment, and its index.

    Without such a token the cosine is `UNLINKED`.
    """
    points = unit(features)
    # (B, F - 1, N, N) of each token with all tokens a frame earlier
    likeness = points[:, 1:] @ points[:, :-1].transpose(2, 3)
    allowed = free[:, 1:, :, None] & free[:, :-1, None] & (segments.place[:, 1:] > 0)[..., None, None]
    # The first frame has nothing before it, so it is never linked.
    strength = torch.full_like(points[..., 0], UNLINKED)
    parent = torch.zeros_like(free, dtype=torch.long)
    strength[:, 1:], parent[:, 1:] = likeness.masked_fill(~allowed, UNLINKED).max(dim=3)
    return strength, parent


def strong_links(strength: Tensor, segments: Segments, threshold: float, spare: int) -> Tensor:
    """Mask (B, F, N) of links above the threshold; in segments with more than `spare` a frame, of the strongest."""
    # How many links a segment can spare is `spare` a frame; only so many of its strongest may be used.
    size = strength.shape[2]
    spare_in_segment = spare * segments.length
    flat, run = strength.flatten(1), segments.first[..., None].expand_as(strength).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, run.gather(1, order).argsort(dim=1, stable=True))
    # Sorted within segments, a segment's values begin where its first frame's tokens did.
    weakest = flat.gather(1, order).gather(1, (segments.first * size + spare_in_segment - 1).clamp(min=0))
    # (B, F) the first link that is one too many; with none to spare, no link is strong enough.
    weakest = weakest.clamp(min=UNLINKED + EPSILON).masked_fill(spare_in_segment == 0, float("inf"))
    strong = strength > threshold
    too_many = segments.sum(strong.sum(dim=2)) > spare_in_segment
    return torch.where(too_many[..., None], strength > weakest[..., None], strong)


def sum_trees(features: Tensor, linked: Tensor, parent: Tensor) -> Tensor:
    """Add linked tokens of (B, F, N, D) to their parents, last frame first; divide each by 1 + its own children."""
    total = features.clone()
    index = torch.arange(features.shape[2], device=features.device)[:, None]
    children = torch.zeros_like(features[..., 0])
    # From the last frame on, so that a token has its own children before it joins its parent.
    for frame in range(features.shape[1] - 1, 0, -1):
        joins = ((parent[:, frame, None] == index) & linked[:, frame, None]).float()
        total[:, frame - 1] += joins @ total[:, frame]
        children[:, frame - 1] = joins.sum(dim=2)
    return total / (1 + children[..., None])


def cluster_roots(trees: Tensor, roots: Tensor, segments: Segments, per_frame: int) -> tuple[Tensor, Tensor]:
    """Cluster each frame's roots, so that a segment is left with about `per_frame` a frame.

    A segment that has no more roots than that keeps them all as they are.

    Returns:
        Centres (B, F, N) and the means of their clusters (B, F, N, D).
    """
    # (B, F) roots of each frame, and the share of its segment's roots that the budget leaves
    number = roots.sum(dim=2)
    share = (per_frame * segments.length).double() / segments.sum(number).clamp(min=1)
    quota = torch.minimum((number * share).ceil().long(), number)
    points, flat = trees.flatten(0, 1), roots.flatten(0, 1)
    # (B * F, N): each frame is clustered by itself
    score, distance = density_peaks(points, flat, quota.flatten(), NEIGHBOURS)
    centres = best_of_frame(score.view_as(roots), quota)
    mean, _ = gather_members(points, -distance, centres.flatten(0, 1), flat)
    return centres, torch.where((share < 1)[..., None, None], mean.view_as(trees), trees)
