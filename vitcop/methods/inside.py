"""What methods that prune inside the language model have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vitcop.budget import Geometry, Plan, scaled_layers, shares_to_counts, solve_stages
from vitcop.methods.base import Method
from vitcop.tokens import LayerTokens


@dataclass(frozen=True, kw_only=True)
class OneLayer(Method):
    """A method with one stage, before a layer; the layers before it see all tokens, which sets the least ratio.

    Attributes:
        layer: the layer before which tokens are dropped; by default at the depth of layer 2 of 32.
    """

    published_layer: ClassVar[int] = 2

    layer: int | None = None

    def plan(self, geometry: Geometry) -> Plan:
        layers = scaled_layers([self.published_layer], geometry.num_layers) if self.layer is None else (self.layer,)
        return solve_stages(
            geometry, self.retention_ratio, layers, lambda scale: shares_to_counts(geometry.num_tokens, [scale])
        )


def last_token_attention(tokens: LayerTokens, *, own_layer: bool) -> Tensor:
    """Attention that the prompt's last token pays to each visual token, mean over heads: (B, K)."""
    return tokens.attention_to_visual(tokens.last, own_layer=own_layer).mean(dim=1).squeeze(1)
