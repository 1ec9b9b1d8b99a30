"""Random scores at ViTCoP's own stages: what its schedule alone is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vitcop.budget import Geometry
from vitcop.methods.random import random_scores
from vitcop.methods.staged import Staged
from vitcop.tokens import LayerTokens, Needs, VisualTokens


@dataclass(frozen=True, kw_only=True)
class RandomStages(Staged):
    """ViTCoP with its counts, layers, clusters and merging, and a random score in place of attention and key norm.

    Question-blind.

    Attributes:
        seed: as for `random`; each stage has scores of its own, the same for every clip of the same shape.
    """

    name: ClassVar[str] = "random_stages"
    baseline: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(keys=True)

    seed: int = 0

    def frame_saliency(self, tokens: VisualTokens, geometry: Geometry) -> Tensor:
        score = random_scores(self.seed, geometry).view(geometry.frames, -1).to(tokens.features.device)
        return score[tokens.first_frame : tokens.first_frame + tokens.frames].expand(len(tokens.features), -1, -1)

    def saliency(self, tokens: LayerTokens, geometry: Geometry) -> Tensor:
        return random_scores(self.seed, geometry, tokens.layer).to(tokens.index.device)[tokens.index]
