"""KeyDiff (arXiv 2504.15364) as a score of visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.inside import OneLayer
from vitcop.ops.similarity import unit
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens


@dataclass(frozen=True, kw_only=True)
class KeyDiff(OneLayer):
    """Before layer K, keep the visual tokens whose keys in layer K - 1 differ most from the mean direction.

    The score is the negative cosine between a key and the mean of the unit keys, mean over key heads. Source:
    KeyDiff, as in kvpress. Question-blind.

    Deviations: the authors compress every layer's cache after the prefill, for each key head apart, text included;
    here the mean direction is that of the visual tokens, which are dropped once, in the prefill, for all heads.
    """

    name: ClassVar[str] = "keydiff"

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        # (B, G, K) -> (B, K), as all heads must drop the same tokens
        score = keydiff_scores(tokens.keys).mean(dim=1)
        return Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))


def keydiff_scores(keys: Tensor) -> Tensor:
    """Negative cosine of each key to the mean of all unit keys: (B, G, S, d_h) -> (B, G, S), float32."""
    directions = unit(keys)
    return -(directions * unit(directions.mean(dim=2, keepdim=True))).sum(dim=-1)
