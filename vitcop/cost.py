"""Multiply-accumulates and cache bytes by formula, so that a measurement can be set against its floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encoder_macs(config: Any, tokens: int) -> float:
    """Multiply-accumulates of a plain vision encoder on one image of `tokens` patches, patch embedding included.

    A layer costs `4 n d^2` for the projections, `2 n^2 d` for attention and `2 n d m` for the MLP.
    """
    dim, mlp = config.hidden_size, config.intermediate_size
    layer = tokens * (4 * dim * dim + 2 * dim * mlp) + 2 * tokens * tokens * dim
    patch = tokens * dim * getattr(config, "num_channels", 3) * config.patch_size**2
    return config.num_hidden_layers * layer + patch


def decoder_macs(config: Any, lengths: Sequence[int]) -> float:
    """Multiply-accumulates of a language model's prefill with `lengths[l]` tokens in layer l, of one sequence.

    A layer costs `2 n d (q + kv)` for the projections (q = H d_h, kv = G d_h, so grouped queries count), `2 n^2 q` for
    attention without the causal half, and `3 n d m` for the gated MLP. The output head is left out.
    """
    dim, mlp = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or dim // heads
    query, key = heads * head_dim, config.num_key_value_heads * head_dim
    return float(sum(n * (2 * dim * (query + key) + 3 * dim * mlp) + 2 * n * n * query for n in lengths))


def kv_bytes(config: Any, lengths: Sequence[int], element_size: int) -> int:
    """Bytes of keys and values that a cache holds for `lengths[l]` tokens in layer l, of one sequence."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head_dim * element_size * sum(lengths)
