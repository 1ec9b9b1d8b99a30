"""Multiply-accumulates and cache bytes by formula, so that a measurement can be set against its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from vitcop.language import TextConfig


class EncoderConfig(Protocol):
    """What is read of a plain vision encoder's config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    patch_size: int | Sequence[int]


def linear_macs(module: nn.Module) -> int:
    """Multiply-accumulates of a module's linear layers for one token, each applied once."""
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))


def encoder_macs(config: EncoderConfig, patches: int, extra: int = 0) -> float:
    """Multiply-accumulates of a plain vision encoder on one image of `patches`, patch embedding included.

    A layer costs `4 n d^2` for the projections, `2 n^2 d` for attention and `2 n d m` for the MLP, with n tokens:
    the patches and `extra` ones (CLS).
    """
    dim, mlp, tokens = config.hidden_size, config.intermediate_size, patches + extra
    layer = tokens * (4 * dim * dim + 2 * dim * mlp) + 2 * tokens * tokens * dim
    # Patch embedding: one linear map of channels * side^2 pixels to `dim`, for each patch (CLS has none).
    side = config.patch_size
    area = side * side if isinstance(side, int) else math.prod(side)
    channels: int = getattr(config, "num_channels", 3)
    return config.num_hidden_layers * layer + patches * dim * channels * area


def decoder_macs(config: TextConfig, lengths: Sequence[int]) -> float:
    """Multiply-accumulates of a language model's prefill with `lengths[l]` tokens in layer l, of one sequence.

    A layer costs `2 n d (q + kv)` for the projections (q = H d_h, kv = G d_h, so grouped queries count), `2 n^2 q` for
    attention without the causal half, and `3 n d m` for the gated MLP. The output head is left out.
    """
    dim, mlp = config.hidden_size, config.intermediate_size
    head_dim = _head_dim(config)
    # Widths of all query heads and of all key/value heads; with grouped queries the second is smaller.
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return float(sum(n * (2 * dim * (query + key) + 3 * dim * mlp) + 2 * n * n * query for n in lengths))


def kv_bytes(config: TextConfig, lengths: Sequence[int], element_size: int) -> int:
    """Bytes of keys and values that a cache holds for `lengths[l]` tokens in layer l, of one sequence."""
    # 2: keys and values.
    return 2 * config.num_key_value_heads * _head_dim(config) * element_size * sum(lengths)


def _head_dim(config: TextConfig) -> int:
    """Width of an attention head; some models have one of their own."""
    own: int | None = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads
