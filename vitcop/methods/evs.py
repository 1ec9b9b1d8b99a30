"""EVS (arXiv 2510.14624): keep what changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.ops.similarity import similarity_to_previous
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import VisualTokens

FIRST_FRAME_SCORE = 255.0


@dataclass(frozen=True, kw_only=True)
class EVS(BeforeModel):
    """Keep the whole first frame, then the tokens that differ most from the same place a frame earlier.

    The score of token i in frame t is `1 - cos(x_t,i, x_(t-1),i)`; the best ones of the whole clip stay, so that a
    frame in which nothing moves may keep none. Source: Efficient Video Sampling, as in vLLM. Question-blind, needs no
    attention.

    Deviations: the total is `round(retention_ratio * V)`, where vLLM truncates, and a ratio below one frame is
    refused, where vLLM keeps the frame all the same. Positions stay the original ones, as published.
    """

    name: ClassVar[str] = "evs"

    def fewest(self, geometry: Geometry) -> int:
        return geometry.tokens_per_frame

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        return Selection(keep=top_k_in_order(evs_scores(tokens.features).flatten(1), plan.entering))


def evs_scores(features: Tensor) -> Tensor:
    """Cosine distance of each token to the frame before: (B, F, N, D) -> (B, F, N); the first frame is above all."""
    # A cosine distance is at most 2, so the first frame stays whole.
    first = torch.full_like(features[:, :1, :, 0], FIRST_FRAME_SCORE, dtype=torch.float32)
    return torch.cat([first, 1 - similarity_to_previous(features)], dim=1)
