"""Random selection: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(BeforeModel):
    """Keep tokens at random before the language model; the same ones for the same seed and shape of a clip.

    Attributes:
        seed: starts the generator, which runs on the CPU, so that every device keeps the same tokens.
    """

    name: ClassVar[str] = "random"
    baseline: ClassVar[bool] = True

    seed: int = 0

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        keep = top_k_in_order(random_scores(self.seed, geometry), plan.entering)
        return Selection(keep=keep.to(tokens.features.device).expand(len(tokens.features), -1))


def random_scores(seed: int, geometry: Geometry, stage: int = 0) -> Tensor:
    """Scores (V,) of a clip's tokens, on the CPU: the same ones for the same seed and shape, others for each stage."""
    generator = torch.Generator().manual_seed(seed)
    # One row of scores for the stage before the model and one for each layer, so that stages differ.
    return torch.rand(geometry.num_layers + 1, geometry.num_tokens, generator=generator)[stage]
