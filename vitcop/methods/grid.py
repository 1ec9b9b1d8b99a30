"""Spatial stride sampling: a baseline that looks at no token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.ops.cells import sample_cells
from vitcop.ops.quotas import spread
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Grid(BeforeModel):
    """Keep tokens of every frame that are evenly spaced over its grid: the middle ones of nearly equal cells."""

    name: ClassVar[str] = "grid"
    baseline: ClassVar[bool] = True
    frame_local: ClassVar[bool] = True

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        return sample_cells(tokens, spread(plan.entering, geometry.frames))
