"""Saliency scores of visual tokens that need no attention map in memory."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
"""Largest softmax block, in elements: 16 MiB in float32, which stays in a CPU's cache (half the time of 64 MiB)."""


def key_norm(keys: Tensor) -> Tensor:
    """L2 norm of the head-mean key: (B, heads, S, d_h) -> (B, S), in float32 (ViTCoP, section on K-vector saliency).

    With grouped queries the mean over key/value heads equals the mean over query heads, because each key head is
    shared by the same number of query heads.
    """
    norm: Tensor = keys.float().mean(dim=1).norm(dim=-1)
    return norm


def key_distance(keys: Tensor) -> Tensor:
    """Distance of the head-mean key from the clip's mean key: (B, heads, S, d_h) -> (B, S), in float32.

    Free of the constant part that a `k_proj` bias adds to every key.
    """
    mean = keys.float().mean(dim=1)
    distance: Tensor = (mean - mean.mean(dim=1, keepdim=True)).norm(dim=-1)
    return distance


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention each token receives, averaged over heads and queries: two (B, heads, N, d_h) -> (B, N), float32.

    Stands in for CLS attention in encoders without a CLS token. The softmax is computed for a block of queries at a
    time, so that at most `BLOCK_ELEMENTS` of the N x N map exist at once.
    """
    batch, heads, count, _ = queries.shape
    received = torch.zeros(batch, keys.shape[2], dtype=torch.float32, device=keys.device)
    transposed = keys.float().transpose(-1, -2)
    # Rows of queries whose softmax over all keys fits into a block.
    block = max(1, BLOCK_ELEMENTS // (batch * heads * keys.shape[2]))
    for start in range(0, count, block):
        rows = queries[:, :, start : start + block].float() * scale
        # (B, heads, rows, N) -> (B, N)
        received += (rows @ transposed).softmax(dim=-1).sum(dim=(1, 2))
    return received / (heads * count)


def attention_rows(queries: Tensor, keys: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax rows of a few queries: (B, H, Q, d_h) x (B, G, S, d_h) -> (B, H, Q, S), float32.

    Query head h reads key head h // (H / G). `mask` (B or 1, 1, Q or 1, S) is True where a key may be seen.
    """
    group = queries.shape[1] // keys.shape[1]
    # (B, H, Q, S)
    logits = queries.float() @ keys.float().repeat_interleave(group, dim=1).transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1)
