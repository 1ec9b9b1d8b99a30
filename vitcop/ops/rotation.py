"""Features that say where and when a token is: a rotary encoding of its place."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0
"""Of the frame's angles, and of the row's and the column's unless they have their own."""
ST_BASE = 1000.0
"""Of the row's and the column's angles in Tango's ST-RoPE (arXiv 2604.09547)."""


def rotate_by_position(features: Tensor, height: int, width: int, place_base: float = BASE) -> Tensor:
    """Rotary encoding, in float32, of frame, row and column on features (B, F, N, D), a third of the channels each."""
    # The channels of frame, row and column; what does not divide by 3 goes to the frame.
    third, extra = divmod(features.shape[-1], 3)
    frame = torch.arange(features.shape[1], device=features.device)[:, None].expand(-1, height * width)
    place = torch.arange(height * width, device=features.device).expand_as(frame)
    parts = features.float().split([third + extra, third, third], dim=-1)
    turns = ((frame, BASE), (place // width, place_base), (place % width, place_base))
    return torch.cat([_rotate(part, *turn) for part, turn in zip(parts, turns, strict=True)], dim=-1)


def _rotate(features: Tensor, position: Tensor, base: float) -> Tensor:
    """Turn neighbouring channels of (..., D) by an angle that grows with the position (...); an odd last one stays."""
    pairs = features.shape[-1] // 2
    frequency = base ** -(torch.arange(pairs, device=features.device) / max(pairs, 1))
    # (..., pairs), slower for later pairs
    angle = position[..., None] * frequency
    even, odd = features[..., 0 : 2 * pairs : 2], features[..., 1 : 2 * pairs : 2]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)
    return torch.cat([turned.flatten(-2), features[..., 2 * pairs :]], dim=-1)
