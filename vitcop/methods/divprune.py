"""DivPrune (CVPR 2025, arXiv 2503.02175): the most diverse set of tokens, greedily."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.base import Proportional
from vitcop.methods.before import BeforeModel
from vitcop.ops.farthest_points import nearest_point
from vitcop.ops.rotation import ST_BASE, rotate_by_position
from vitcop.ops.similarity import farthest_directions, unit
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPrune(Proportional, BeforeModel):
    """Solve the max-min diversity problem over all tokens of the clip greedily, on cosine distance.

    The first token is the one whose nearest neighbour is farthest; each further one is the farthest from those chosen,
    `argmax_j min_(i in S) (1 - cos(i, j))`. Question-blind, needs no attention.

    Deviations: a chosen token is never chosen again, which the published code leaves to its distance being about 0.
    Positions stay the original ones, tokens in their original order. With a `bias`, a dropped token counts for the
    kept one of highest cosine.

    Attributes:
        st_rope: cosines are those of features turned by Tango's ST-RoPE, so that tokens far apart are less alike.
    """

    name: ClassVar[str] = "divprune"

    st_rope: bool = False

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        features = tokens.features
        if self.st_rope:
            features = rotate_by_position(features, tokens.height, tokens.width, ST_BASE)
        # (B, K): chosen greedily over all frames, then put into the order of the clip
        keep = divprune_order(features, plan.entering).sort(dim=1).values
        mass_into = nearest_point(unit(features).flatten(1, 2), keep) if self.bias else None
        return Selection(keep=keep, mass_into=mass_into)


def divprune_order(features: Tensor, count: int) -> Tensor:
    """Flat indices (B, count) of tokens (B, F, N, D) in the order in which they are chosen."""
    return farthest_directions(unit(features).flatten(1, 2), count)
