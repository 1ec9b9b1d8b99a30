"""ViTCoP (arXiv 2601.17818): pruning in the vision encoder, in a shallow and in a deep layer of the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitcop.budget import SHALLOW_AND_DEEP, Geometry, Plan, scaled_layers
from vitcop.calibration.profiles import KEY_SCORES, KeyScore, Profile, find_profile
from vitcop.errors import UnreachableBudgetError
from vitcop.methods.base import Method, check_shares
from vitcop.ops.cluster_quotas import select_in_clusters
from vitcop.ops.clustering import density_peak_clusters, patch_positions
from vitcop.ops.scores import key_distance, key_norm
from vitcop.selection import MergeRule, Selection, take, top_k_in_order
from vitcop.tokens import LayerTokens, Needs, VisualTokens

KeySource = Literal["cached", "before_norm"]

DEEP_SHARE = 1 / 5
"""Tokens of the deep stage for each one of the shallow stage."""
LEAST_SHALLOW_SHARE = 0.4478
"""Shallow tokens for each token entering, in the paper's smallest setting (retention 1/9); kept below it."""


@dataclass(frozen=True, kw_only=True)
class ViTCoP(Method):
    """Three stages: saliency in the vision encoder, clusters and key norms in a shallow layer, key norms in a deep one.

    Stage I keeps the patches of each frame that get most attention from CLS; encoders without a CLS token (SigLIP,
    the Qwen encoders) have none, and there the attention a patch gets on average from all patches takes its place.
    Where the model pools patches into tokens after the encoder (LLaVA-OneVision: 27x27 to 14x14), scores and keys are
    pooled alike. The survivors of a frame are clustered on their keys. Stage II gives each cluster a share of the
    shallow budget, keeps its tokens of best key score and merges the rest into one. Stage III keeps the tokens of
    best key score. Positions stay the original ones throughout (the authors re-index at stage III).

    The layers, shares and ratios default to lines through the paper's three settings (L = 32, retention 1/3, 2/9 and
    1/9): vision keep 0.2 + 0.9 r, clusters 0.09 + 0.27 r of a frame's kept tokens, layers L/16 and 11 L/16, and a
    deep budget of 1/5 of the shallow one. Where these cannot meet a ratio, below 1/9 the vision share shrinks so
    that the shallow share of it stays the paper's least, and above about 1/2 the deep budget takes what is left.

    Attributes:
        key_score: what marks a salient token: "small" norm of the head-mean key (the paper), "large" norm, or a large
            "distance" from the clip's mean key. Which one holds differs between models; "profile" takes, at each
            stage, the score (and, unless given here, the layers) that `python jobs/calibrate.py` measured.
        profile: the measured profile or its path, for "profile"; by default the one in the model's folder.
        key_source: whose norm it is. "cached" (the paper) is the key as attention uses it, normed and rotated.
            "before_norm" is what `k_proj` puts out, for models that norm each head's key (`k_norm`: Qwen3): there the
            norms of the cached keys are nearly equal, and only that of their mean over heads still differs. In models
            without such a norm both give the same, as rotation turns all heads alike, save for "distance". The bias
            that Qwen2 and Qwen2.5 have in `k_proj` is part of both; "distance" of "before_norm" is free of it.
        merge: "authors" (token plus mean of its group, as published) or "mean".
        vision_keep, cluster_fraction, shallow_layer, deep_layer: overrides of the defaults above.
    """

    name: ClassVar[str] = "vitcop"
    frame_local: ClassVar[bool] = True

    key_score: KeyScore | Literal["profile"] = "small"
    profile: Profile | str | Path | None = None
    key_source: KeySource = "cached"
    merge: MergeRule = "authors"
    vision_keep: float | None = None
    cluster_fraction: float | None = None
    shallow_layer: int | None = None
    deep_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_score not in (*KEY_SCORES, "profile"):
            raise ValueError(f"key_score must be 'small', 'large', 'distance' or 'profile', got {self.key_score!r}")
        if self.profile is not None and self.key_score != "profile":
            raise ValueError(f"a profile goes with key_score='profile', got key_score={self.key_score!r}")
        if self.key_source not in ("cached", "before_norm"):
            raise ValueError(f"key_source must be 'cached' or 'before_norm', got {self.key_source!r}")
        if self.key_score == "profile" and self.key_source != "cached":
            raise ValueError(f"profiles are measured on cached keys, got key_source={self.key_source!r}")
        check_shares(self, "vision_keep", "cluster_fraction")
        if isinstance(self.profile, str | Path):
            object.__setattr__(self, "profile", Profile.load(self.profile))
        if self.merge not in ("authors", "mean"):
            raise ValueError(f"merge must be 'authors' or 'mean', got {self.merge!r}")

    @property
    def needs(self) -> Needs:
        return Needs(attention=True, keys=True, previous_hidden=self.key_source == "before_norm")

    def bind(self, model: PreTrainedModel) -> ViTCoP:
        """The method with the profile that it needs, found beside the model unless it was given.

        Raises:
            ProfileError: there is none, or it is of another model.
        """
        if self.key_score != "profile":
            return self
        bound = self if self.profile else replace(self, profile=find_profile(model))
        bound._measured.check(model.config.get_text_config().num_hidden_layers)
        return bound

    @property
    def _measured(self) -> Profile:
        if not isinstance(self.profile, Profile):
            raise RuntimeError("key_score='profile' without a profile; `prune` looks for it beside the model (bind)")
        return self.profile

    def layers(self, num_layers: int) -> tuple[int, int]:
        """The layers before which stages II and III prune; a deep layer of `num_layers` means no stage III."""
        shallow, deep = scaled_layers(SHALLOW_AND_DEEP, num_layers)
        if self.key_score == "profile":
            shallow, deep = self._measured.shallow.layer, self._measured.deep.layer
        shallow = shallow if self.shallow_layer is None else self.shallow_layer
        deep = max(shallow + 1, deep) if self.deep_layer is None else self.deep_layer
        if not 0 < shallow < deep <= num_layers:
            raise ValueError(f"need 0 < shallow layer < deep layer <= {num_layers}, got {shallow} and {deep}")
        return shallow, deep

    def plan(self, geometry: Geometry) -> Plan:
        names = {-1: "vision"}
        if self.retention_ratio == 1:
            return Plan(entering=geometry.num_tokens, names=names)
        shallow, deep = self.layers(geometry.num_layers)
        middle, tail = deep - shallow, geometry.num_layers - deep
        rest = middle + tail * DEEP_SHARE  # what a token of the shallow stage costs, in layers
        keep = self._keep_share(geometry, shallow, rest)
        most = keep * geometry.num_tokens

        def shallow_budget(entering: int) -> tuple[float, float]:
            left = geometry.total(self.retention_ratio) - entering * shallow
            return left, left / rest

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
        plan = Plan(entering=entering, layers=layers, names=names | {shallow: "shallow", deep: "deep"})
        self._check(plan, geometry)
        return plan

    def _keep_share(self, geometry: Geometry, shallow: int, rest: float) -> float:
        """Share of tokens that enter the language model."""
        least = self.retention_ratio * geometry.num_layers / (shallow + LEAST_SHALLOW_SHARE * rest)
        return self.vision_keep or min(1.0, 0.2 + 0.9 * self.retention_ratio, least)

    def _check(self, plan: Plan, geometry: Geometry) -> None:
        counts = plan.per_layer(geometry.num_layers)
        wanted = self.retention_ratio * geometry.num_tokens
        mean = sum(counts) / len(counts)
        if abs(mean - wanted) > 1:
            raise UnreachableBudgetError(
                f"retention_ratio {self.retention_ratio} is {wanted:.1f} of {geometry.num_tokens} tokens a layer; "
                f"{self.describe()} comes to {mean:.1f}; change the ratio, vision_keep or the layers"
            )

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        if tokens.attention is None or tokens.keys is None:
            raise RuntimeError("ViTCoP needs the vision encoder's attention and keys")
        first, end = tokens.first_frame, tokens.first_frame + tokens.frames
        holding = frames_with_tokens(plan.entering, geometry.frames, first, end)
        before = len(frames_with_tokens(plan.entering, geometry.frames, 0, first))
        attention, keys = tokens.attention, tokens.keys
        if len(holding) < tokens.frames:
            local = torch.tensor([frame - first for frame in holding], dtype=torch.long, device=keys.device)
            attention, keys = attention.index_select(1, local), keys.index_select(1, local)
        else:
            local = torch.arange(tokens.frames, device=keys.device)

        kept = top_k_in_order(attention, tokens_per_frame(plan.entering, geometry.frames))
        clusters = self.clusters_per_frame(kept.shape[2])
        label = cluster_frames(keys, kept, tokens.height, tokens.width, clusters)
        # Labels count over the clip, so that clusters of different frames and chunks differ.
        frame_number = torch.arange(before, before + len(holding), device=keys.device)
        return Selection(
            keep=(kept + local[:, None] * geometry.tokens_per_frame).flatten(1),
            labels=(label + frame_number[:, None] * clusters).flatten(1),
        )

    def clusters_per_frame(self, kept: int) -> int:
        """Cluster centres among the `kept` tokens of a frame."""
        return max(1, int((self.cluster_fraction or 0.09 + 0.27 * self.retention_ratio) * kept))

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        saliency, count = self.saliency(tokens, geometry), plan.layers[tokens.layer]
        shallow, _ = self.layers(geometry.num_layers)
        if tokens.layer != shallow:
            return Selection(keep=top_k_in_order(saliency, count))
        if tokens.labels is None:
            raise RuntimeError("stage II needs the cluster labels of stage I")
        per_frame = self.clusters_per_frame(tokens_per_frame(plan.entering, geometry.frames))
        clusters = per_frame * len(frames_with_tokens(plan.entering, geometry.frames, 0, geometry.frames))
        return select_in_clusters(saliency, tokens.labels, clusters, count, self.merge)

    def saliency(self, tokens: LayerTokens, geometry: Geometry) -> Tensor:
        """(B, K) score of each visual token; higher is more salient."""
        score = self._measured.best(tokens.layer) if self.key_score == "profile" else self.key_score
        keys = tokens.keys if self.key_source == "cached" else tokens.plain_keys
        if score == "distance":
            return key_distance(keys)
        norm = key_norm(keys)
        return -norm if score == "small" else norm


def tokens_per_frame(entering: int, frames: int) -> int:
    """Tokens of each frame that has any; with fewer tokens than frames, one each for some of the frames."""
    return max(1, entering // frames)


def frames_with_tokens(entering: int, frames: int, first: int, end: int) -> list[int]:
    """The frames in [first, end) that keep tokens: all, or, with fewer tokens than frames, that many spread evenly."""
    share = min(entering, frames)
    return [frame for frame in range(first, end) if (frame + 1) * share // frames > frame * share // frames]


def cluster_frames(keys: Tensor, kept: Tensor, height: int, width: int, clusters: int) -> Tensor:
    """Cluster each frame's kept tokens: keys (B, F, N, d), kept (B, F, n) -> labels (B, F, n) in [0, clusters)."""
    flat = kept.flatten(0, 1)
    features = take(keys.flatten(0, 1), flat)
    positions = patch_positions(height, width, kept.device)[flat]
    return density_peak_clusters(features, positions, clusters).view_as(kept)
