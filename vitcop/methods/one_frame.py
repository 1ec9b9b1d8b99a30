"""One frame: the floor that tells how much of a benchmark needs no video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import Floor
from vitcop.ops.cells import sample_cells
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class OneFrame(Floor):
    """Keep the whole middle frame and nothing else, whatever `retention_ratio` says."""

    name: ClassVar[str] = "one_frame"
    baseline: ClassVar[bool] = True
    frame_local: ClassVar[bool] = True

    def plan(self, geometry: Geometry) -> Plan:
        return Plan(entering=geometry.tokens_per_frame, names={-1: "vision"})

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        quotas = [0] * geometry.frames
        quotas[geometry.frames // 2] = geometry.tokens_per_frame
        return sample_cells(tokens, quotas)
