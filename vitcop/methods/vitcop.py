"""ViTCoP (arXiv 2601.17818): pruning in the vision encoder, in a shallow and in a deep layer of the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from vitcop.budget import Geometry
from vitcop.calibration.profiles import KEY_SCORES, KeyScore, Profile, find_profile
from vitcop.methods.before import required
from vitcop.methods.staged import Staged
from vitcop.ops.scores import key_distance, key_norm
from vitcop.tokens import LayerTokens, Needs, VisualTokens

KeySource = Literal["cached", "before_norm"]


@dataclass(frozen=True, kw_only=True)
class ViTCoP(Staged):
    """Three stages: saliency in the vision encoder, clusters and key norms in a shallow layer, key norms in a deep one.

    Stage I keeps the patches of each frame that get most attention from CLS; encoders without a CLS token (SigLIP,
    the Qwen encoders) have none, and there the attention a patch gets on average from all patches takes its place.
    Where the model pools patches into tokens after the encoder (LLaVA-OneVision: 27x27 to 14x14), scores and keys are
    pooled alike. The survivors of a frame are clustered on their keys. Stage II gives each cluster a share of the
    shallow budget, keeps its tokens of best key score and merges the rest into one. Stage III keeps the tokens of
    best key score. Positions stay the original ones throughout (the authors re-index at stage III).

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
    """

    name: ClassVar[str] = "vitcop"

    key_score: KeyScore | Literal["profile"] = "small"
    profile: Profile | str | Path | None = None
    key_source: KeySource = "cached"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_score not in (*KEY_SCORES, "profile"):
            raise ValueError(f"key_score must be 'small', 'large', 'distance' or 'profile', got {self.key_score!r}")
        if self.profile is not None and self.key_score != "profile":
            raise ValueError(f"a profile goes with key_score='profile', got key_score={self.key_score!r}")
        if self.key_source not in get_args(KeySource):
            raise ValueError(f"key_source must be 'cached' or 'before_norm', got {self.key_source!r}")
        if self.key_score == "profile" and self.key_source != "cached":
            raise ValueError(f"profiles are measured on cached keys, got key_source={self.key_source!r}")
        # Read here, so that a wrong path fails where the method is made; frozen, so set past the dataclass.
        if isinstance(self.profile, str | Path):
            object.__setattr__(self, "profile", Profile.load(self.profile))

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
        bound = (
            self
            if self.profile
            else replace(self, profile=find_profile(model, "key_score='profile' without profile=PATH"))
        )
        bound._measured.check(model.config.get_text_config().num_hidden_layers)
        return bound

    @property
    def _measured(self) -> Profile:
        if not isinstance(self.profile, Profile):
            raise RuntimeError("key_score='profile' without a profile; `prune` looks for it beside the model (bind)")
        return self.profile

    def default_layers(self, num_layers: int) -> tuple[int, int]:
        if self.key_score == "profile":
            return self._measured.shallow.layer, self._measured.deep.layer
        return super().default_layers(num_layers)

    def frame_saliency(self, tokens: VisualTokens, geometry: Geometry) -> Tensor:
        return required(tokens.attention, "attention")

    def saliency(self, tokens: LayerTokens, geometry: Geometry) -> Tensor:
        # A profile may name one score for the shallow stage and another for the deep one.
        score = self._measured.best(tokens.layer) if self.key_score == "profile" else self.key_score
        keys = tokens.keys if self.key_source == "cached" else tokens.plain_keys
        if score == "distance":
            return key_distance(keys)
        norm = key_norm(keys)
        return -norm if score == "small" else norm
