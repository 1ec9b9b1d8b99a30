"""Key norm (arXiv 2406.11430) as a score of visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.inside import OneLayer
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens


@dataclass(frozen=True, kw_only=True)
class Knorm(OneLayer):
    """Before layer K, keep the visual tokens whose keys in layer K - 1 are shortest, or longest.

    The score is the negative L2 norm of a key, mean over key heads. Source: the L2-norm KV compression, as in
    kvpress. Question-blind.

    Deviations: the authors compress every layer's cache after the prefill, for each key head apart, text included;
    here visual tokens are dropped once, in the prefill, for all heads, so the norms are averaged over them.

    Attributes:
        keep: "small" norms (the paper) or "large" ones; which are salient differs between models.
    """

    name: ClassVar[str] = "knorm"

    keep: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in ("small", "large"):
            raise ValueError(f"keep must be 'small' or 'large', got {self.keep!r}")

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        # (B, G, K) -> (B, K), as all heads must drop the same tokens
        score = knorm_scores(tokens.keys).mean(dim=1)
        score = score if self.keep == "small" else -score
        return Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))


def knorm_scores(keys: Tensor) -> Tensor:
    """Negative L2 norm of each key: (B, G, S, d_h) -> (B, G, S), float32."""
    norm: Tensor = keys.float().norm(dim=-1)
    return -norm
