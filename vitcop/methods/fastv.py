"""FastV (arXiv 2403.06764): after a shallow layer, keep what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitcop.budget import Geometry, Plan
from vitcop.methods.inside import OneLayer, last_token_attention
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens, Needs


@dataclass(frozen=True, kw_only=True)
class FastV(OneLayer):
    """Before layer K, keep the visual tokens that the prompt's last token attends to most in layer K - 1.

    The score is the mean over heads of that one softmax row, which is computed from the layer's own queries and
    cached keys. Source: the paper's `agg_layer` K = 2 and its in-place branch. Question-aware.

    Deviations: K follows the model's depth; grouped queries and batches work. Positions stay the original ones, as
    published.
    """

    name: ClassVar[str] = "fastv"
    query_aware: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(previous_hidden=True)

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        score = last_token_attention(tokens, own_layer=False)
        return Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))
