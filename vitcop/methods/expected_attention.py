"""Expected attention (kvpress, arXiv 2510.00636) as a score of visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.base import check_at_least_one
from vitcop.methods.before import required
from vitcop.methods.inside import OneLayer
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens, Needs


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(OneLayer):
    """Before layer K, keep the visual tokens that queries still to come are expected to attend to in layer K - 1.

    Future queries are taken as normal, with the mean and covariance of the prompt's queries before rotation, rotated
    to the positions after the prompt on average. A key's expected attention is the softmax of
    `k.mu / sqrt(d) + k'Ck / 2d`, mean over the query heads of a key head, times the norm of its value. The question's
    queries are among the prompt's, so it is question-aware, if weakly.

    Deviations: the authors compress every layer's cache after the prefill, for each key head apart, text included;
    here visual tokens are dropped once, in the prefill, for all key heads, by the mean of their scores.

    Attributes:
        future_positions: positions after the prompt over which the rotation is averaged.
        sinks: first tokens of the prompt, left out of the statistics and always scored highest.
        use_covariance, use_value_norm: the two refinements of the score.
        epsilon: added to the attention before it is multiplied by the value's norm.
    """

    name: ClassVar[str] = "expected_attention"
    query_aware: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(previous_hidden=True)

    future_positions: int = 512
    sinks: int = 4
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "future_positions")

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        # (B, G, S) -> (B, S) over key heads, then the visual positions
        score = self.scores(tokens).mean(dim=1).gather(1, tokens.visual)
        return Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))

    def scores(self, tokens: LayerTokens) -> Tensor:
        """(B, G, S) score of each token of the sequence for each key head, float32."""
        keys, heads = tokens.previous_keys.float(), tokens.previous_keys.shape[1]
        sink, counted = self._parts(tokens)
        mean, covariance = self.future_queries(tokens, counted)
        # Query heads by the key head that they share: (B, G, H / G, d_h) and (B, G, H / G, d_h, d_h).
        mean, covariance = mean.unflatten(1, (heads, -1)), covariance.unflatten(1, (heads, -1))
        dim = keys.shape[-1]
        # The log of E[exp(q k / sqrt(d))] for normal queries q: (B, G, H / G, S).
        logit = torch.einsum("bgsd,bghd->bghs", keys, mean) / dim**0.5
        if self.use_covariance:
            logit += torch.einsum("bgsd,bghde,bgse->bghs", keys, covariance, keys) / (2 * dim)
        # (B, G, S) mean over the query heads of a key head
        attention = logit.masked_fill(~counted[:, None, None], float("-inf")).softmax(dim=-1).mean(dim=2)
        if self.use_value_norm:
            attention = (attention + self.epsilon) * tokens.previous_values.float().norm(dim=-1)
        attention = attention.masked_fill(~counted[:, None], 0)
        # Sinks score above all others, padding 0.
        highest = attention.amax(dim=(1, 2))[:, None, None] + 1
        return torch.where(sink[:, None], highest, attention)

    def _parts(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        """Masks (B, S) of the sinks and of the tokens that the statistics count, which is all others but padding."""
        valid = tokens.valid
        if valid is None:
            valid = torch.ones(tokens.hidden.shape[:2], dtype=torch.bool, device=tokens.hidden.device)
        # Counted over tokens, as padding on the left would move the first ones.
        early = valid.long().cumsum(dim=1) <= self.sinks
        return valid & early, valid & ~early

    def future_queries(self, tokens: LayerTokens, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, H, d_h) and covariance (B, H, d_h, d_h) of queries at the positions after the prompt."""
        hidden = required(tokens.previous_hidden, "the input of the layer before")
        # (B, H, S, d_h) queries before rotation, of which padding and sinks weigh nothing
        queries = tokens.language.queries(tokens.layer - 1, hidden).float()
        weight = counted[:, None, :, None].float()
        number = weight.sum(dim=2)
        mean = (queries * weight).sum(dim=2) / number
        # (B, H, S, d_h), then the covariance over S
        offset = (queries - mean[:, :, None]) * weight
        covariance = offset.transpose(2, 3) @ offset / number[..., None]

        future = tokens.next_position[:, None] + torch.arange(self.future_positions, device=hidden.device)
        # (B, 1, d_h, d_h) mean rotation over the positions to come
        turn = rotation(*(part.float().mean(dim=1) for part in tokens.language.rotary_at(hidden, future)))[:, None]
        return (turn @ mean[..., None]).squeeze(-1), turn @ covariance @ turn.transpose(2, 3)


def rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """The matrices (B, d, d) of the rotary embedding in half-split form with cosine and sine (B, d)."""
    half = cos.shape[-1] // 2
    identity = torch.eye(2 * half, device=cos.device)
    # (d, d): turns (low, high) into (-high, low), the second half of a rotation in half-split form
    swap = torch.cat((-identity[half:], identity[:half]))
    return cos[..., None] * identity + sin[..., None] * swap
