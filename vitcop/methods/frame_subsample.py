"""Fewer frames, all their tokens: the baseline of simply sampling the video more thinly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel
from vitcop.ops.cells import sample_cells
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FrameSubsample(BeforeModel):
    """Keep all tokens of frames evenly spread over the clip and none of the others.

    What a budget leaves beyond whole frames goes to one more frame, the last of those spread, on an even grid. Frames
    keep the positions they had, so that time between them stays visible. A budget below one frame is refused.
    """

    name: ClassVar[str] = "frame_subsample"
    baseline: ClassVar[bool] = True
    frame_local: ClassVar[bool] = True

    def fewest(self, geometry: Geometry) -> int:
        return geometry.tokens_per_frame

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        # Whole frames, and a part of one more where the budget does not divide.
        whole, rest = divmod(plan.entering, geometry.tokens_per_frame)
        used = whole + (rest > 0)
        quotas = [0] * geometry.frames
        for number in range(used):
            # The middles of `used` equal stretches of the clip.
            frame = (2 * number + 1) * geometry.frames // (2 * used)
            quotas[frame] = geometry.tokens_per_frame if number < whole else rest
        return sample_cells(tokens, quotas)
