"""FastVID (NeurIPS 2025, arXiv 2503.11187): salient tokens, and dense ones that gather their segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel, required
from vitcop.ops.density import density_peaks, gather_members
from vitcop.ops.quotas import best_of_frame, keep_mask, meet_count
from vitcop.ops.segments import Segments, split_at_changes
from vitcop.ops.similarity import similarity_to_previous, unit
from vitcop.selection import Selection
from vitcop.tokens import Needs, VisualTokens

Flavour = Literal["onevision", "video"]
NEIGHBOURS = 4


@dataclass(frozen=True, kw_only=True)
class FastVID(BeforeModel):
    """Cut the clip where it changes; keep salient tokens of each frame and context tokens of each segment.

    Segments end where adjacent frames are less alike than `threshold`, and there are at least `min_segments`. Of a
    frame's budget, the share `1 - context_share` goes to tokens of most attention. The rest of a segment's budget goes
    to anchor frames, its last and every `anchor_stride`-th before it: their densest distinct tokens (DPC-kNN) each
    average the tokens of the segment most like them, with a weight of at least `beta` for themselves. Question-blind.

    Deviations: frames are compared by their mean token and saliency is the attention of the layer that feeds the
    projector (mean received, without a CLS token), because checkpoints lack the pooling head that the authors probe;
    no noise on densities; counts that exceed the tokens there are are capped; and what rounding loses of the total is
    made up by the tokens of next highest attention. Positions stay the original ones, as published.

    Attributes:
        flavour: how counts are rounded and who is averaged: as published for LLaVA-OneVision or for LLaVA-Video.
    """

    name: ClassVar[str] = "fastvid"
    needs: ClassVar[Needs] = Needs(attention=True)

    flavour: Flavour = "onevision"
    min_segments: int = 8
    threshold: float = 0.9
    context_share: float = 0.4
    anchor_stride: int = 4
    beta: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flavour not in ("onevision", "video"):
            raise ValueError(f"flavour must be 'onevision' or 'video', got {self.flavour!r}")

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        attention = required(tokens.attention, "attention")
        # (B, F - 1) of each frame's mean token to the one before
        similarity = similarity_to_previous(tokens.features.float().mean(dim=2))
        segments = split_at_changes(similarity, self.threshold, self.min_segments)
        salient, context, features = self.choose(tokens.features, attention, segments, plan.entering // tokens.frames)
        mask = meet_count((salient | context).flatten(1), attention.flatten(1), plan.entering)
        return keep_mask(mask, plan.entering, features.flatten(1, 2))

    def choose(
        self, features: Tensor, attention: Tensor, segments: Segments, per_frame: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (B, F, N) of salient and of context tokens, about `per_frame` a frame, and features (B, F, N, D)."""
        quotas = onevision_quotas if self.flavour == "onevision" else video_quotas
        salient_quota, context_quota = quotas(segments, per_frame, self.context_share, self.anchor_stride)
        # (B, F, N) masks; a frame's densest tokens are looked for among those that are not salient
        salient = best_of_frame(attention, salient_quota)
        score, _ = density_peaks(features.flatten(0, 1), (~salient).flatten(0, 1), NEIGHBOURS, NEIGHBOURS)
        context = best_of_frame(score.view_as(attention), context_quota) & ~salient
        whole = self.flavour == "onevision"
        # As published, an anchor with no more context tokens than its own frame's gathers from that frame only.
        alone = context_quota == per_frame - salient_quota if whole else torch.zeros_like(context_quota).bool()
        return salient, context, merge_segments(features, ~salient, context, segments, alone, whole, self.beta)


def onevision_quotas(segments: Segments, per_frame: int, share: float, stride: int) -> tuple[Tensor, Tensor]:
    """Salient and context tokens (B, F) of each frame: the same count a frame, context moved to anchor frames."""
    context = int(per_frame * share)
    anchors = (segments.length + stride - 1) // stride
    # The context of a whole segment, shared out among its anchor frames.
    moved = torch.where(_is_anchor(segments, stride), context * segments.length // anchors, 0)
    return torch.full_like(moved, per_frame - context), moved


def video_quotas(segments: Segments, per_frame: int, share: float, stride: int) -> tuple[Tensor, Tensor]:
    """Salient and context tokens (B, F) of each frame: counted by segment, remainders to the first in line."""
    # (B, F) frames in the segment, and frames between this one and its last
    length, back = segments.length, segments.length - 1 - segments.place
    # float64, as the published code counts in Python: float32 could truncate to another count.
    context = (per_frame * length * torch.tensor(share, dtype=torch.float64)).long()
    salient = per_frame * length - context
    anchors = (length + stride - 1) // stride
    moved = context // anchors + (back // stride < context % anchors).long()
    return (
        salient // length + (segments.place < salient % length).long(),
        torch.where(_is_anchor(segments, stride), moved, 0),
    )


def _is_anchor(segments: Segments, stride: int) -> Tensor:
    return (segments.length - 1 - segments.place) % stride == 0


def merge_segments(
    features: Tensor, free: Tensor, context: Tensor, segments: Segments, alone: Tensor, whole: bool, beta: float
) -> Tensor:
    """Average into each context token the tokens of its segment most like it; frame by frame, each on its own.

    Args:
        features: (B, F, N, D).
        free: (B, F, N) tokens that may be averaged.
        context: (B, F, N) tokens that gather.
        alone: (B, F) frames whose context tokens gather from their own frame only.
        whole: whether context tokens are among the tokens that their own frame averages.
        beta: least weight of the context token itself.

    Returns:
        (B, F, N, D) float32; other tokens as they were.
    """
    features, points = features.float(), unit(features)
    frame = torch.arange(features.shape[1], device=features.device)
    merged = []
    for number in range(features.shape[1]):
        # (F,) this frame, and (B, F) the frames that its context tokens may gather from
        own = frame == number
        reach = torch.where(alone[:, number, None], own, segments.same[:, number])
        # (B, F, N) tokens that are averaged
        pool = free & reach[..., None]
        if not whole:
            pool = pool & ~(context & own[:, None])
        # (B, N, F * N) cosine of this frame's tokens with all
        likeness = points[:, number] @ points.flatten(1, 2).transpose(1, 2)
        mean, count = gather_members(features.flatten(1, 2), likeness, context[:, number], pool.flatten(1))
        # The more a context token gathers, the less it weighs itself, but `beta` at least.
        weight = (1 / (count + 1)).clamp(min=beta)[..., None]
        blend = weight * features[:, number] + (1 - weight) * mean
        merged.append(torch.where(context[:, number, :, None], blend, features[:, number]))
    return torch.stack(merged, dim=1)
