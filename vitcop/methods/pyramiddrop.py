"""PyramidDrop (arXiv 2410.17247): drop a share of the visual tokens at each of a few depths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitcop.budget import Geometry, Plan, scaled_layers, shares_to_counts, solve_stages
from vitcop.methods.base import Method
from vitcop.methods.inside import last_token_attention
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """Before each of some layers, keep the visual tokens that the prompt's last token would attend to most there.

    The coming layer's own norm and projections give that one softmax row, whose mean over heads is the score. A stage
    keeps the share lambda of what the stage before it left; lambda is solved for the ratio (the paper fixes 0.5 or
    so). The first layers see all tokens: with the default layers nothing below a quarter can be reached.
    Question-aware.

    Deviations: positions stay the original ones (the authors renumber after each stage); the last stage keeps what
    truncated counts leave of the budget; grouped queries work.

    Attributes:
        layers: the layers before which tokens are dropped; by default at the depths of 8, 16 and 24 of 32.
    """

    name: ClassVar[str] = "pyramiddrop"
    query_aware: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None

    def plan(self, geometry: Geometry) -> Plan:
        layers = scaled_layers((8, 16, 24), geometry.num_layers) if self.layers is None else self.layers

        def counts(share: float) -> list[int]:
            return shares_to_counts(geometry.num_tokens, [share**stage for stage in range(1, len(layers) + 1)])

        return solve_stages(geometry, self.retention_ratio, layers, counts)

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        score = last_token_attention(tokens, own_layer=True)
        return Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))
