"""ViTCoP's schedule, for any score: a stage in the vision encoder, a shallow and a deep one in the language model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from vitcop.budget import SHALLOW_AND_DEEP, Geometry, Plan, keep_all, scaled_layers
from vitcop.errors import UnreachableBudgetError
from vitcop.methods.base import Method, check_shares
from vitcop.methods.before import required
from vitcop.ops.cluster_quotas import select_in_clusters
from vitcop.ops.clustering import density_peak_clusters, patch_positions
from vitcop.ops.quotas import spread
from vitcop.selection import MergeRule, Selection, take, top_k_in_order
from vitcop.tokens import LayerTokens, VisualTokens

DEEP_SHARE = 1 / 5
"""Tokens of the deep stage for each one of the shallow stage."""
LEAST_SHALLOW_SHARE = 0.4478
"""Shallow tokens for each token entering, in the paper's smallest setting (retention 1/9); kept below it."""


@dataclass(frozen=True, kw_only=True)
class Staged(Method):
    """The best tokens of each frame enter the model, clusters share a shallow layer's budget, and the best go deeper.

    The layers, shares and ratios default to lines through the paper's three settings (L = 32, retention 1/3, 2/9 and
    1/9): vision keep 0.2 + 0.9 r, clusters 0.09 + 0.27 r of a frame's kept tokens, layers L/16 and 11 L/16, and a
    deep budget of 1/5 of the shallow one. Where these cannot meet a ratio, below 1/9 the vision share shrinks so
    that the shallow share of it stays the paper's least, and above about 1/2 the deep budget takes what is left.
    Where a family has tokens that can't be pruned, r is what the ratio leaves of the others.

    Attributes:
        merge: what the merged token of a cluster is: "authors" (the token in the middle plus the mean of what the
            cluster did not keep, as published) or "mean".
        vision_keep, cluster_fraction, shallow_layer, deep_layer: overrides of the defaults above.
    """

    frame_local: ClassVar[bool] = True

    merge: MergeRule = "authors"
    vision_keep: float | None = None
    cluster_fraction: float | None = None
    shallow_layer: int | None = None
    deep_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "vision_keep", "cluster_fraction")
        if self.merge not in get_args(MergeRule):
            raise ValueError(f"merge must be 'authors' or 'mean', got {self.merge!r}")

    # -- how many ---------------------------------------------------------------------------------------------------

    def default_layers(self, num_layers: int) -> tuple[int, int]:
        """The shallow and the deep layer unless they are overridden."""
        shallow, deep = scaled_layers(SHALLOW_AND_DEEP, num_layers)
        return shallow, deep

    def layers(self, num_layers: int) -> tuple[int, int]:
        """The layers before which stages II and III prune; a deep layer of `num_layers` means no stage III."""
        shallow, deep = self.default_layers(num_layers)
        shallow = shallow if self.shallow_layer is None else self.shallow_layer
        deep = max(shallow + 1, deep) if self.deep_layer is None else self.deep_layer
        if not 0 < shallow < deep <= num_layers:
            raise ValueError(f"need 0 < shallow layer < deep layer <= {num_layers}, got {shallow} and {deep}")
        return shallow, deep

    def plan(self, geometry: Geometry) -> Plan:
        if self.retention_ratio == 1:
            return keep_all(geometry)
        share = geometry.share(self.retention_ratio)
        if share <= 0:
            raise UnreachableBudgetError(
                f"retention_ratio {self.retention_ratio} keeps none of {geometry.num_tokens} visual tokens; "
                f"use {geometry.least(1)}"
            )
        shallow, deep = self.layers(geometry.num_layers)
        middle, tail = deep - shallow, geometry.num_layers - deep
        rest = middle + tail * DEEP_SHARE  # what a token of the shallow stage costs, in layers
        least = share * geometry.num_layers / (shallow + LEAST_SHALLOW_SHARE * rest)
        keep = self.vision_keep or min(1.0, 0.2 + 0.9 * share, least)  # of the tokens, how many enter the model
        most = keep * geometry.num_tokens

        def shallow_budget(entering: int) -> tuple[float, float]:
            left = geometry.total(self.retention_ratio) - entering * shallow
            return left, left / rest

        # Every frame keeps equally many; with less than one token a frame, some frames keep one.
        per_frame = int(keep * geometry.tokens_per_frame)
        entering = per_frame * geometry.frames if per_frame else max(1, round(most))
        left, wanted = shallow_budget(entering)
        if min(wanted, most) > entering and per_frame:  # the fraction of a token a frame cut off is needed after all
            entering += geometry.frames
            left, wanted = shallow_budget(entering)
        kept = min(max(1, round(min(wanted, most))), entering)
        layers = {shallow: kept}
        if tail:
            # The share of the shallow budget, unless that is at its most: then what is left.
            deep_kept = kept * DEEP_SHARE if wanted <= most else (left - kept * middle) / tail
            layers[deep] = min(max(1, round(deep_kept)), kept)
        names = {-1: "vision", shallow: "shallow", deep: "deep"}
        plan = Plan(entering=entering, layers=layers, names=names)
        self._check(plan, geometry)
        return plan

    def _check(self, plan: Plan, geometry: Geometry) -> None:
        counts = plan.per_layer(geometry.num_layers)
        wanted = geometry.share(self.retention_ratio) * geometry.num_tokens
        mean = sum(counts) / len(counts)
        if abs(mean - wanted) > 1:
            raise UnreachableBudgetError(
                f"retention_ratio {self.retention_ratio} is {wanted:.1f} of {geometry.num_tokens} tokens a layer; "
                f"{self.describe()} comes to {mean:.1f}; change the ratio, vision_keep or the layers"
            )

    def clusters_per_frame(self, kept: int, geometry: Geometry) -> int:
        """Cluster centres among the `kept` tokens of a frame."""
        fraction = self.cluster_fraction or 0.09 + 0.27 * geometry.share(self.retention_ratio)
        return max(1, int(fraction * kept))

    # -- which ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def frame_saliency(self, tokens: VisualTokens, geometry: Geometry) -> Tensor:
        """(B, F, N) score of each token before the model; higher is more salient."""

    @abstractmethod
    def saliency(self, tokens: LayerTokens, geometry: Geometry) -> Tensor:
        """(B, K) score of each visual token inside the model; higher is more salient."""

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        saliency, keys = self.frame_saliency(tokens, geometry), required(tokens.keys, "keys")
        quotas = spread(plan.entering, geometry.frames)
        first, end = tokens.first_frame, tokens.first_frame + tokens.frames
        # Frames here that keep tokens, by their number among these frames; with few tokens not all of them do.
        holding = [frame - first for frame in range(first, end) if quotas[frame]]
        local = torch.tensor(holding, dtype=torch.long, device=keys.device)
        if len(holding) < tokens.frames:
            saliency, keys = saliency.index_select(1, local), keys.index_select(1, local)
        # (B, F', n) the same number of each of these frames
        kept = top_k_in_order(saliency, max(quotas))
        clusters = self.clusters_per_frame(kept.shape[2], geometry)
        label = cluster_frames(keys, kept, tokens.height, tokens.width, clusters)
        # Labels count over the clip, so that clusters of different frames and chunks differ.
        before = sum(map(bool, quotas[:first]))
        number = torch.arange(before, before + len(holding), device=keys.device)
        return Selection(
            keep=(kept + local[:, None] * geometry.tokens_per_frame).flatten(1),
            labels=(label + number[:, None] * clusters).flatten(1),
        )

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        saliency, count = self.saliency(tokens, geometry), plan.layers[tokens.layer]
        shallow, _ = self.layers(geometry.num_layers)
        if tokens.layer != shallow:
            return Selection(keep=top_k_in_order(saliency, count))
        quotas = spread(plan.entering, geometry.frames)
        clusters = self.clusters_per_frame(max(quotas), geometry) * sum(map(bool, quotas))
        labels = required(tokens.labels, "the cluster labels of stage I")
        return select_in_clusters(saliency, labels, clusters, count, self.merge)


def cluster_frames(keys: Tensor, kept: Tensor, height: int, width: int, clusters: int) -> Tensor:
    """Cluster each frame's kept tokens: keys (B, F, N, d), kept (B, F, n) -> labels (B, F, n) in [0, clusters)."""
    flat = kept.flatten(0, 1)
    features = take(keys.flatten(0, 1), flat)
    positions = patch_positions(height, width, kept.device)[flat]
    return density_peak_clusters(features, positions, clusters).view_as(kept)
