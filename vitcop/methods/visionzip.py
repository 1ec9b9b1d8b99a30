"""VisionZip (CVPR 2025, arXiv 2412.04467): tokens that draw attention, and a few that gather the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel, required
from vitcop.ops.quotas import best_of_frame, even_quota_sum, even_quotas
from vitcop.ops.similarity import unit
from vitcop.selection import Selection, true_indices
from vitcop.tokens import Needs, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisionZip(BeforeModel):
    """Keep each frame's dominant tokens as they are and merge the others into contextual ones.

    Dominant tokens get most attention in the vision encoder. Of the rest, every step-th is a target; each other token
    joins the target whose key is most like its own, and a target becomes itself plus the mean of those who joined.
    Question-blind.

    Deviations: merging happens on the projected tokens (the authors merge before the projector), a frame's CLS token
    is not kept on top, a clip's total is spread evenly over frames and split 54 : 10 into dominant and contextual
    tokens, and tokens keep their original order and positions (the authors put contextual tokens last). Encoders
    without a CLS token give the mean attention received.

    Attributes:
        contextual_share: contextual tokens among those kept.
    """

    name: ClassVar[str] = "visionzip"
    frame_local: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(attention=True, keys=True)

    contextual_share: float = 10 / 64

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        attention, keys = required(tokens.attention, "attention"), required(tokens.keys, "keys")
        first, end = tokens.first_frame, tokens.first_frame + tokens.frames
        quota = even_quotas(plan.entering, geometry.frames, attention.device, first, end)
        # (F,) of each frame; the same for all clips of a batch
        contextual = (quota * self.contextual_share).round().long()
        dominant, target, joins = visionzip_select(attention, keys, quota - contextual, contextual)
        return merged_selection(
            dominant | target, target, joins, even_quota_sum(plan.entering, geometry.frames, first, end)
        )


def visionzip_select(
    attention: Tensor, keys: Tensor, dominant: Tensor, contextual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose `dominant` (F,) and `contextual` (F,) tokens of each frame.

    Args:
        attention: (B, F, N).
        keys: (B, F, N, d).

    Returns:
        Masks (B, F, N) of the dominant tokens and of the targets, and the number within its frame of the target
        (B, F, N) that each token's key is most like.
    """
    # (B, F, N) dominant tokens
    chosen = best_of_frame(attention, dominant.expand(attention.shape[:2]))
    rest = attention.shape[2] - dominant
    step = (rest // contextual.clamp(min=1)).clamp(min=1)[:, None]
    # (B, F, N) number of each token among the rest; every step-th is a target
    place = (~chosen).long().cumsum(dim=2) - 1
    target = ~chosen & (place % step == 0) & (place // step < contextual[:, None])
    direction = unit(keys)
    # (B, F, N, N); only targets can be joined
    similarity = direction @ direction.transpose(2, 3)
    return chosen, target, similarity.masked_fill(~target[:, :, None], float("-inf")).argmax(dim=3)


def merged_selection(kept: Tensor, target: Tensor, joins: Tensor, count: int) -> Selection:
    """Keep `count` tokens, the mask `kept` (B, F, N), and add to each target the mean of the tokens that join it."""
    size = kept.shape[2]
    # (B, F * N) place of each token among the kept ones
    slot = kept.flatten(1).long().cumsum(dim=1) - 1
    frame = torch.arange(kept.shape[1], device=kept.device)[:, None]
    # The slot of the target that each token joins; kept tokens and frames without a target join nothing.
    joined = slot.gather(1, (joins + frame * size).flatten(1))
    free = ~kept & target.any(dim=2, keepdim=True)
    return Selection(
        keep=true_indices(kept.flatten(1), count),
        merge_into=torch.where(free.flatten(1), joined, -1),
        merge="authors",
    )
