"""VidCom2 (EMNLP 2025, arXiv 2505.14454): frames that stand out get more tokens, and keep those that stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.ops.quotas import best_of_frame, keep_mask, meet_count
from vitcop.ops.similarity import unit
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens

BANDWIDTHS = tuple(2.0**power for power in range(-3, 2))
TEMPERATURE = 0.01
CHANNEL_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class VidCom2(BeforeModel):
    """Keep each frame's tokens least like the clip's centre and the frame's centre.

    Features are cut to the half of the channels that varies least over the clip and scaled to length 1. Likeness to a
    centre c is `g(x, c) = sum_a exp(-|x - c|^2 / 2a)`, a from 1/8 to 2. Frame f gets the share
    `r (1 + p_f - mean p)`, p the softmax of `-mean_i g(x_i, clip centre) / 0.01`, and keeps its tokens of lowest
    `g(x, clip centre) + g(x, frame centre)`. Question-blind, needs no attention.

    Deviations: the published shares are rounded frame by frame and drift from the total; as in vLLM, tokens are then
    dropped or added by the same score over the whole clip until the total is exact. With fewer tokens than frames the
    least of one token a frame falls away too. Positions stay the original ones.
    """

    name: ClassVar[str] = "vidcom2"

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        to_clip, to_frame = vidcom2_likeness(tokens.features)
        mask = vidcom2_select(to_clip, to_frame, geometry.share(self.retention_ratio)).flatten(1)
        mask = meet_count(mask, -(to_clip + to_frame).flatten(1), plan.entering)
        return keep_mask(mask, plan.entering)


def vidcom2_likeness(features: Tensor) -> tuple[Tensor, Tensor]:
    """Likeness of tokens (B, F, N, D) to their clip's centre and to their frame's centre, (B, F, N) each."""
    points = unit(steady_channels(features))
    return _likeness(points, points.mean(dim=(1, 2), keepdim=True)), _likeness(points, points.mean(dim=2, keepdim=True))


def steady_channels(features: Tensor) -> Tensor:
    """The half of the channels of features (B, F, N, D) that varies least over each clip -> (B, F, N, D // 2)."""
    variance = features.float().flatten(1, 2).var(dim=1, correction=0)
    count = max(1, int(features.shape[-1] * CHANNEL_SHARE))
    # (B, D // 2) channel numbers, ascending, of each clip
    channels = variance.topk(count, largest=False).indices.sort(dim=-1).values
    return features.gather(3, channels[:, None, None].expand(*features.shape[:3], -1))


def vidcom2_shares(to_clip: Tensor, ratio: float) -> Tensor:
    """Fraction (B, F) of its tokens that each frame keeps."""
    # (B, F) how much a frame stands out from its clip; adds up to 1
    distinct = (-to_clip.mean(dim=2) / TEMPERATURE).softmax(dim=1)
    return (ratio * (1 + distinct - distinct.mean(dim=1, keepdim=True))).clamp(max=1)


def vidcom2_select(to_clip: Tensor, to_frame: Tensor, ratio: float) -> Tensor:
    """Mask (B, F, N) of the tokens kept as published, about `ratio` of them."""
    count = to_clip.shape[2]
    quota = (vidcom2_shares(to_clip, ratio) * count).round().long().clamp(1, count)
    return best_of_frame(-(to_clip + to_frame), quota)


def _likeness(points: Tensor, centre: Tensor) -> Tensor:
    # (B, F, N) squared distance, seen at five bandwidths
    square = (points - centre).square().sum(dim=-1)
    return torch.stack([(-square / (2 * width)).exp() for width in BANDWIDTHS]).sum(dim=0)
