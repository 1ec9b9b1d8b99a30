"""Text only: the floor that tells how many questions can be guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import Floor
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class TextOnly(Floor):
    """Keep no visual token at all, whatever `retention_ratio` says.

    The clip is encoded all the same, only to be dropped, so that its times are not those of a model without video.
    What can't be pruned stays: the newline of LLaVA-OneVision, which counts as text and tells nothing, but also the CLS
    tokens of Video-LLaVA, which tell something and are in the record.
    """

    name: ClassVar[str] = "text_only"
    baseline: ClassVar[bool] = True
    frame_local: ClassVar[bool] = True

    def plan(self, geometry: Geometry) -> Plan:
        return Plan(entering=0, names={-1: "vision"})

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        features = tokens.features
        return Selection(keep=torch.empty(len(features), 0, dtype=torch.long, device=features.device))
