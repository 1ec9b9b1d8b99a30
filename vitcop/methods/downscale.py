"""Smaller frames: the baseline of simply giving the model less of each picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.ops.cells import sample_cells
from vitcop.ops.quotas import spread
from vitcop.selection import Selection, take
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Downscale(BeforeModel):
    """Shrink every frame before the vision tower, so that it makes about as many tokens as are wanted.

    Frames shrink to the token grid, near the model's own aspect, that wastes least; the few tokens beyond the budget
    are left out evenly. Each token stands where it would stand in the full grid. The only baseline that saves time in
    the vision tower too, and it runs where a family can encode smaller frames (LLaVA-OneVision, by interpolated
    position embeddings); elsewhere it is refused. A budget below one token a frame is refused as well.
    """

    name: ClassVar[str] = "downscale"
    baseline: ClassVar[bool] = True
    frame_local: ClassVar[bool] = True

    def plan(self, geometry: Geometry) -> Plan:
        plan = super().plan(geometry)
        per_frame = max(spread(plan.entering, geometry.frames))
        return replace(plan, grid=small_grid(per_frame, geometry.height, geometry.width))

    def fewest(self, geometry: Geometry) -> int:
        return geometry.frames

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        if (tokens.height, tokens.width) != plan.grid:
            raise RuntimeError(f"frames were not encoded at {plan.grid} tokens, but {tokens.height, tokens.width}")
        # (B, K) numbers within the small grids
        chosen = sample_cells(tokens, spread(plan.entering, geometry.frames)).keep
        place = torch.arange(geometry.num_tokens, device=chosen.device).view(-1, geometry.height, geometry.width)
        # Row i of the small grid is centred on row (2i + 1) / 2 * full / small of the model's own.
        rows, columns = (
            (2 * torch.arange(small, device=chosen.device) + 1) * full // (2 * small)
            for small, full in ((tokens.height, geometry.height), (tokens.width, geometry.width))
        )
        # (F * n,) number in the full grid of each token of the small one
        original = place[: tokens.frames, rows[:, None], columns].flatten()
        return Selection(keep=original[chosen], features=take(tokens.features.flatten(1, 2), chosen))


def small_grid(count: int, height: int, width: int) -> tuple[int, int]:
    """The grid of at least `count` tokens, no larger than height x width, with least waste times stretch."""

    def cost(rows: int, columns: int) -> float:
        stretch = rows * width / (columns * height)
        return rows * columns * max(stretch, 1 / stretch)

    # For each number of rows the fewest columns that reach `count`.
    grids = [(rows, -(-count // rows)) for rows in range(1, height + 1)]
    return min((grid for grid in grids if grid[1] <= width), key=lambda grid: cost(*grid))
