"""VScan (arXiv 2505.22654): a global and a local scan of each frame, and one stage half-way through the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan, scaled_layers, shares_to_counts, solve_stages
from vitcop.methods.base import Method, check_at_least_one, check_shares
from vitcop.methods.before import required
from vitcop.methods.inside import last_token_attention
from vitcop.ops.quotas import best_of_frame, even_quota_sum, even_quotas, rank
from vitcop.ops.similarity import unit
from vitcop.selection import Selection, top_k_in_order, true_indices
from vitcop.tokens import LayerTokens, Needs, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VScan(Method):
    """Scan each frame before the language model, merge what is not chosen, and prune by the question in mid-model.

    Half of a frame's tokens are those that draw most attention in the vision encoder (global scan), the other half
    those that do so within their window of the frame (local scan); every other token is averaged into the chosen one
    most like it. Before the middle layer, a third of them is kept, those that the prompt's last token would attend to
    most there, by the layer's own norm and projections. Question-aware in mid-model.

    Deviations: both scans read the attention of the layer that feeds the projector (the authors' local scan reads a
    shallow layer's); merging is done on the projected tokens; a clip's total is spread evenly over frames; positions
    stay the original ones (the authors renumber them in mid-model). The mid-model stage alone is held against their
    vectors.

    Attributes:
        layer: the layer before which the second stage runs; by default at the depth of layer 16 of 32.
        inner_share: tokens left after it for each one before it (the authors' 96 to 32).
        window: side of a window of the local scan, in tokens.
    """

    name: ClassVar[str] = "vscan"
    query_aware: ClassVar[bool] = True
    frame_local: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(attention=True)

    layer: int | None = None
    inner_share: float = 1 / 3
    window: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "window")
        check_shares(self, "inner_share")

    def plan(self, geometry: Geometry) -> Plan:
        layers = scaled_layers([16], geometry.num_layers) if self.layer is None else (self.layer,)

        def counts(scale: float) -> list[int]:
            return shares_to_counts(geometry.num_tokens, [min(1.0, scale / self.inner_share), scale])

        return solve_stages(geometry, self.retention_ratio, layers, counts, before_model=True)

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        attention = required(tokens.attention, "attention")
        span = (tokens.first_frame, tokens.first_frame + tokens.frames)
        quota = even_quotas(plan.entering, geometry.frames, attention.device, *span)
        chosen = scan(attention, window_mask(tokens.height, tokens.width, self.window, attention.device), quota)
        count = even_quota_sum(plan.entering, geometry.frames, *span)
        return Selection(keep=true_indices(chosen.flatten(1), count), merge_into=most_alike(tokens.features, chosen))

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        score = last_token_attention(tokens, own_layer=True)
        return Selection(keep=top_k_in_order(score, plan.layers[tokens.layer]))


def window_mask(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """(N, N) mask of the pairs of tokens, in raster order, that lie in the same window of `side` x `side`."""
    rows, columns = (torch.arange(length, device=device) // side for length in (height, width))
    # (N,) number of the window of each token; numbers need only differ
    window = (rows[:, None] * width + columns).flatten()
    return window[:, None] == window


def scan(attention: Tensor, same_window: Tensor, quota: Tensor) -> Tensor:
    """Mask (B, F, N) of `quota` (F,) tokens of each frame: half by attention (B, F, N), the rest window by window.

    The windows take turns: first the best token left of each, in order of attention, then the second best, and so on.
    """
    # (B, F) tokens for the local scan; the global one takes the odd one
    local = (quota // 2).expand(attention.shape[:2])
    chosen = best_of_frame(attention, quota - local)
    # (B, F, N) rank by attention of those that the global scan left
    place = rank(attention.masked_fill(chosen, float("-inf")))
    # How many of its own window come before a token.
    turn = ((place[..., None, :] < place[..., None]) & same_window).sum(dim=-1)
    # By turn first, then by attention; chosen ones come last.
    order = turn * attention.shape[2] + place
    order = order.masked_fill(chosen, attention.shape[2] ** 2)
    return chosen | best_of_frame(-order, local)


def most_alike(features: Tensor, chosen: Tensor) -> Tensor:
    """(B, F * N) slot, among the `chosen` (B, F, N), of the token of its frame that each token is most like.

    Likeness is the cosine of features (B, F, N, D); a frame that keeps nothing gives -1.
    """
    points = unit(features)
    # (B, F, N, N) to the chosen tokens of the same frame
    similarity = (points @ points.transpose(2, 3)).masked_fill(~chosen[:, :, None], float("-inf"))
    own = torch.arange(chosen.shape[2], device=chosen.device)
    best = torch.where(chosen, own, similarity.argmax(dim=3))
    # (B, F, N) place of each chosen token among all that are kept
    slot = (chosen.flatten(1).long().cumsum(dim=1) - 1).view_as(chosen)
    return torch.where(chosen.any(dim=2, keepdim=True), slot.gather(2, best), -1).flatten(1)
