"""Spatial average pooling: a baseline that merges neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.ops.cells import grid_cells, sample_cells
from vitcop.ops.quotas import spread
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class AveragePool(BeforeModel):
    """Cut every frame into as many nearly equal cells as it keeps tokens, and keep the mean of each cell.

    A mean stands where the middle token of its cell stood. Frames that keep none (fewer tokens than frames) are lost.
    """

    name: ClassVar[str] = "average_pool"
    baseline: ClassVar[bool] = True
    frame_local: ClassVar[bool] = True

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        quotas = spread(plan.entering, geometry.frames)
        sampled = sample_cells(tokens, quotas)
        here = quotas[tokens.first_frame : tokens.first_frame + tokens.frames]
        # (F,) tokens of each frame here, and (F, N) the cell of each token within its frame
        quota = torch.tensor(here, device=tokens.features.device)
        cell, _ = grid_cells(tokens.height, tokens.width, quota)
        # (F, N) place among the kept tokens: the cells of earlier frames come first
        slot = (quota.cumsum(0) - quota)[:, None] + cell
        # A frame that keeps nothing has no cell to merge into.
        merge_into = torch.where(quota[:, None] > 0, slot, -1).flatten()
        return Selection(keep=sampled.keep, merge_into=merge_into.expand(len(sampled.keep), -1))
