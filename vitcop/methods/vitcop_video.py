"""ViTCoP for video: three stages that keep what is unusual in the clip and far from what is kept already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vitcop.budget import Geometry, Plan, single_stage
from vitcop.methods.base import Proportional, check_shares
from vitcop.ops.farthest_points import farthest_points, nearest_point
from vitcop.ops.importance import importance, outlier_scale
from vitcop.selection import Selection, take
from vitcop.tokens import LayerTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class ViTCoPVideo(Proportional):
    """ViTCoP's stages, with importance and farthest points in place of attention, density peaks and key norms.

    Stage I, before the language model, keeps tokens of the whole clip that are important and far from each other in
    direction, time and place, and merges every other token into the nearest of them, which stays at its position.
    Stages II and III, in a shallow and in a deep layer, choose among the hidden states in the same way, with the
    importance from stage I, and drop the others; with a `bias`, these count for the nearest one kept. Importance is the
    distance of a token from the clip's mean and from what its place shows over the scene, and is lower inside a run of
    unchanged content. See `importance`.

    Question-blind; needs neither attention nor keys. Of V tokens at ratio r, 1.5 rV enter, rV pass stage II and
    rV / 2 stage III (layers that don't divide by 4: solved for the same mean).

    Cost: 3 rV steps of a greedy in all, three kernels each (see `farthest_points`), and V (4096 + 1.5 rV) D
    multiply-adds in stage I; at 7B (V = 6272, D = 3584) and 10 %, 1,882 steps, half as many in turn, 25 KB a window
    and step, and 0.2 % of the unpruned prefill's multiply-adds. Not measured on a GPU.

    Attributes:
        entering_share, deep_share: tokens of stages I and III for each one of stage II.
        shallow, deep: depth of stages II and III, as a share of the layers.
        place_weight: length of the clip, and of a frame's sides, beside directions of length 1.
        floor: least importance.
        motion: share of motion in the rest of the importance; less of it keeps more of what stands still.
        inside_run: factor on the importance of a token whose place shows the same before and after.
        scenes: what a place usually shows is asked scene by scene; otherwise over the whole clip.
    """

    name: ClassVar[str] = "vitcop_video"

    entering_share: float = 1.5
    deep_share: float = 0.5
    shallow: float = 0.25
    deep: float = 0.75
    place_weight: float = 1.0
    floor: float = 0.1
    motion: float = 0.5
    inside_run: float = 0.3
    scenes: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "deep_share", "shallow", "deep", "floor", "inside_run")
        if self.entering_share < 1:
            raise ValueError(f"entering_share must be at least 1, got {self.entering_share}")
        if self.place_weight < 0 or not 0 <= self.motion <= 1:
            raise ValueError(
                f"place_weight must be at least 0 and motion in [0, 1], got {self.place_weight} and {self.motion}"
            )

    def plan(self, geometry: Geometry) -> Plan:
        one_stage = single_stage(geometry, self.retention_ratio)  # refuses less than a token
        if self.retention_ratio == 1:
            return one_stage
        total, depth, most = geometry.total(self.retention_ratio), geometry.num_layers, geometry.num_tokens
        shallow = min(depth, max(1, round(self.shallow * depth)))
        deep = min(depth, max(shallow + 1, round(self.deep * depth)))
        middle, tail = deep - shallow, depth - deep  # layers that see n1 and n2 tokens; `shallow` layers see n0

        # Tokens of stage II if no count had to be whole; each further count makes good what rounding has cost so far.
        unit = total / (self.entering_share * shallow + middle + self.deep_share * tail)
        n2 = max(1, round(self.deep_share * unit))
        n1 = max(n2, round((total - n2 * tail) / (self.entering_share * shallow + middle)))
        n0 = min(most, max(n1, round((total - n2 * tail - n1 * middle) / shallow)))
        if n0 == most and middle:  # all of them enter: stage II takes what is left
            n1 = min(most, max(n2, round((total - n0 * shallow - n2 * tail) / middle)))
        layers = {shallow: n1} if middle else {}
        if tail:  # the last stage absorbs the rounding
            layers[deep] = min(n1, max(1, round((total - n0 * shallow - n1 * middle) / tail)))
        return Plan(entering=n0, layers=layers, names={**one_stage.names, shallow: "shallow", deep: "deep"})

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        scale = outlier_scale(tokens.features)
        weight = importance(
            tokens.features, scale, floor=self.floor, motion=self.motion, inside_run=self.inside_run, scenes=self.scenes
        ).flatten(1)
        # (B, V) number of each token, from which its frame, row and column are known
        index = torch.arange(geometry.num_tokens, device=weight.device).expand(len(weight), -1)
        # (B, V, D + 3), see `_points`
        points = self._points(tokens.features.flatten(1, 2), scale.flatten(1), index, geometry)
        keep = farthest_points(points, weight, plan.entering)
        slot = nearest_point(points, keep)
        # An outlier is not averaged with others: it would be most of the mean.
        alone = scale.flatten(1) < 1
        slot = torch.where((alone | take(alone, keep).gather(1, slot)) & (take(keep, slot) != index), -1, slot)
        return Selection(keep=keep, merge_into=slot, labels=take(weight, keep))

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        assert tokens.labels is not None
        points = self._points(tokens.features, outlier_scale(tokens.features), tokens.index, geometry)
        keep = farthest_points(points, tokens.labels, plan.layers[tokens.layer])
        return Selection(keep=keep, mass_into=nearest_point(points, keep) if self.bias else None)

    def _points(self, features: Tensor, scale: Tensor, index: Tensor, geometry: Geometry) -> Tensor:
        """Directions from the mean (B, K, D) beside the tokens' frame, row and column: (B, K, D + 3)."""
        tamed = features.float() * scale[..., None]
        direction = normalize(tamed.sub_(tamed.mean(dim=1, keepdim=True)), dim=-1)
        # (B, K) where each token stands in the clip, from its number
        frame, place = index // geometry.tokens_per_frame, index % geometry.tokens_per_frame
        row, column = place // geometry.width, place % geometry.width
        sides = (frame / geometry.frames, row / geometry.height, column / geometry.width)
        return torch.cat([direction, self.place_weight * torch.stack(sides, dim=-1)], dim=-1)
