"""The language model of a video language model: norms, projections and rotation, the same in every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vitcop.errors import UnsupportedModelError

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine (B, S, d_h) of the tokens' positions."""


class TextConfig(Protocol):
    """What is read of a language model's config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int


class SelfAttention(Protocol):
    """What is read of a decoder layer's attention, beside `q_proj`, `k_proj` and, in some models, norms after them."""

    head_dim: int
    scaling: float


class DecoderLayer(Protocol):
    """What is read of a decoder layer, and what `prune` changes on it."""

    self_attn: SelfAttention
    input_layernorm: Callable[[Tensor], Tensor]
    mlp: nn.Module

    def register_forward_pre_hook(self, hook: Callable[..., object], *, with_kwargs: bool = False) -> Removable: ...


class Removable(Protocol):
    """A registered hook."""

    def remove(self) -> None: ...


class TextModel(Protocol):
    """What is read of a language model without its head, as all decoders of transformers have it."""

    config: TextConfig
    layers: Sequence[DecoderLayer]
    norm: Callable[[Tensor], Tensor]
    rotary_emb: Callable[[Tensor, Tensor], Rotary]


class CacheLayer(Protocol):
    """One layer's keys and values (B, G, S, d_h)."""

    keys: Tensor
    values: Tensor


class KVCache(Protocol):
    """What is read of a transformers `Cache`."""

    layers: Sequence[CacheLayer]

    def get_seq_length(self, layer_idx: int = 0) -> int: ...


class LanguageModel:
    """The decoder layers' own computations, one at a time.

    Raises:
        UnsupportedModelError: a layer sees less than all tokens before it (sliding windows).
    """

    def __init__(self, text: TextModel) -> None:
        self.text = text
        self.config = text.config
        # Configs without `layer_types` are older families, whose layers all see the whole prompt.
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedModelError(
                f"{type(text).__name__} has {', '.join(sorted(kinds))} layers; only full attention can be pruned"
            )

    @property
    def layers(self) -> Sequence[DecoderLayer]:
        return self.text.layers

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def attention_scale(self, layer: int) -> float:
        """The factor on the dot products of queries and keys in `layer`."""
        return self.layers[layer].self_attn.scaling

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm that the language model ends with, of hidden states (B, S, D) from any layer."""
        return self.text.norm(hidden)

    def rotary_at(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Cosine and sine (B, S, d_h) of text tokens at `positions` (B, S), in the dtype of `hidden`."""
        return self.text.rotary_emb(hidden, positions)

    def queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Queries (B, H, S, d_h), not rotated yet, that `layer` computes from its input `hidden` (B, S, D)."""
        return self._normed(layer, "q", hidden)

    def rotated_queries(self, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Queries (B, H, S, d_h) that `layer` computes from its input `hidden` (B, S, D)."""
        return rotate(self._normed(layer, "q", hidden), rotary)

    def rotated_keys(self, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Keys (B, G, S, d_h) that `layer` computes from its input `hidden` (B, S, D)."""
        return rotate(self._normed(layer, "k", hidden), rotary)

    def plain_keys(self, layer: int, hidden: Tensor) -> Tensor:
        """Keys (B, G, S, d_h) that `layer` computes from its input `hidden` (B, S, D), before any norm or rotation."""
        return self._projected(layer, "k", hidden).transpose(1, 2)

    def _normed(self, layer: int, kind: str, hidden: Tensor) -> Tensor:
        """Queries or keys (B, heads, S, d_h) after the norm that some models (Qwen3) have on each head."""
        states = self._projected(layer, kind, hidden)
        # The norm is over the last axis of (B, S, heads, d_h), each head's channels.
        norm = getattr(self.layers[layer].self_attn, f"{kind}_norm", None)
        return (norm(states) if norm is not None else states).transpose(1, 2)

    def _projected(self, layer: int, kind: str, hidden: Tensor) -> Tensor:
        """Projection (B, S, heads, d_h) of a layer's input."""
        block = self.layers[layer]
        project = cast(Callable[[Tensor], Tensor], getattr(block.self_attn, f"{kind}_proj"))
        states: Tensor = project(block.input_layernorm(hidden)).unflatten(-1, (-1, block.self_attn.head_dim))
        # (B, S, heads * d_h) -> (B, S, heads, d_h); the number of heads follows, as keys have fewer than queries
        return states


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding, half-split form: states (B, H, S, d_h), cosine and sine (B, S, d_h)."""
    # (B, 1, S, d_h): one angle for all heads of a token
    cos, sin = (part.unsqueeze(1) for part in rotary)
    low, high = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-high, low), dim=-1) * sin
