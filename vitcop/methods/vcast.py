"""V-CAST (arXiv 2603.27650): more tokens where the clip's path through feature space bends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.ops.quotas import best_of_frame, keep_mask
from vitcop.ops.similarity import unit
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class VCAST(BeforeModel):
    """Share the budget out over frames by curvature, and keep each frame's unusual and strong tokens.

    With m_f the mean token of frame f at length 1, curvature is `1 - cos(m_f - m_(f-1), m_(f+1) - m_f)`, 1 at both
    ends. Frames get `least` tokens each and the rest in proportion to `softmax(curvature / temperature)`. A token's
    score is `1 - cos(x, m_f)` plus its norm, min-max scaled within the frame. Question-blind, needs no attention.

    Deviations: none in the counts, which are exact as published: what rounding down leaves over goes, all of it, to
    the frame of largest fraction. Below `least` tokens a frame nothing is guaranteed, where the published code raises
    the total; a single frame is pruned, where it is passed through. Positions stay the original ones, as published.

    Attributes:
        temperature: of the softmax over frames.
        least: tokens that every frame keeps, if there are enough.
    """

    name: ClassVar[str] = "vcast"

    temperature: float = 0.7
    least: int = 1

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        mask = vcast_select(tokens.features, plan.entering, self.temperature, self.least)
        return keep_mask(mask.flatten(1), plan.entering)


def vcast_select(features: Tensor, count: int, temperature: float, least: int) -> Tensor:
    """Mask (B, F, N) of the `count` tokens kept of features (B, F, N, D)."""
    features = features.float()
    # (B, F, D) mean token of each frame, a path through feature space
    centre = unit(features.mean(dim=2))
    weight = (curvature(centre) / temperature).softmax(dim=1)
    quota = vcast_quotas(weight, count, features.shape[2], least if count >= least * features.shape[1] else 0)
    norm = features.norm(dim=-1)
    low, high = norm.aminmax(dim=2, keepdim=True)
    # (B, F, N) unlike the frame's mean, or long: the norm is scaled to 0 .. 1 within the frame
    score = 1 - (unit(features) * centre[:, :, None]).sum(dim=-1) + (norm - low) / (high - low + EPSILON)
    return best_of_frame(score, quota)


def curvature(path: Tensor) -> Tensor:
    """How sharply a path (B, F, D) turns at each of its points: 0 straight on, 2 back; 1 at the ends -> (B, F)."""
    bend = torch.ones_like(path[..., 0])
    # (B, F - 1, D); at the ends there is no bend to measure, so they count as 1
    step = path.diff(dim=1)
    bend[:, 1:-1] = 1 - functional.cosine_similarity(step[:, :-1], step[:, 1:], dim=-1, eps=EPSILON)
    return bend


def vcast_quotas(weight: Tensor, count: int, most: int, least: int) -> Tensor:
    """Tokens (B, F) of each frame, `least` to `most`, that add up to `count`, by weights (B, F) that add up to 1."""
    # (B, F) not whole yet; what rounding down leaves over goes by the largest fractions
    ideal = weight * (count - least * weight.shape[1])
    quota = least + ideal.floor().long().clamp(max=most - least)
    order = (ideal - ideal.floor()).argsort(dim=1, descending=True, stable=True)
    # (B, F) how many more each frame can take, largest fraction first
    room = (most - quota).gather(1, order)
    left = count - quota.sum(dim=1, keepdim=True)
    # The first in line take all that is left, as far as their frames have tokens.
    given = torch.minimum((left - room.cumsum(dim=1) + room).clamp(min=0), room)
    return quota + torch.zeros_like(quota).scatter_(1, order, given)
