"""Profiles: which key score holds in one model, measured by `calibrate`, and kept beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from vitcop.errors import ProfileError

KeyScore = Literal["small", "large", "distance"]
KEY_SCORES: tuple[KeyScore, ...] = ("small", "large", "distance")

FILE_NAME = "vitcop_profile.json"
FORMAT = 1
COMMAND = "python jobs/calibrate.py"
"""The command that measures a profile, for error messages."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A rank correlation, over clips.

    Attributes:
        mean, spread: over clips; the spread is the standard deviation.
        low, high: 95 % bootstrap interval of the mean.
        agreeing: share of clips whose correlation is positive.
    """

    mean: float
    spread: float
    low: float
    high: float
    agreeing: float


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Rank correlation of each key score with the attention that text pays from `layer` on.

    The keys are those of the layer before, which a stage before `layer` reads. The correlation of "small" is that of
    "large" with the other sign.
    """

    layer: int
    small: Estimate
    large: Estimate
    distance: Estimate

    @property
    def best(self) -> KeyScore:
        """The score of highest mean correlation; the first of small, large, distance among equals."""
        return max(KEY_SCORES, key=lambda score: self.estimate(score).mean)

    def estimate(self, score: KeyScore) -> Estimate:
        """The correlation of one key score."""
        estimates: dict[KeyScore, Estimate] = {"small": self.small, "large": self.large, "distance": self.distance}
        return estimates[score]


@dataclass(frozen=True, kw_only=True)
class StageProfile:
    """The recommended layer and key score for one stage.

    Attributes:
        correlation: mean rank correlation of `key_score` at `layer`.
        sure: share of bootstrap samples of the clips in which this score is the best of the three at this layer.
    """

    layer: int
    key_score: KeyScore
    correlation: float
    sure: float


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A method and its settings, without a retention ratio."""

    method: str
    options: Mapping[str, float | str]

    @property
    def name(self) -> str:
        """As the sweep takes it: `vitcop_video:motion=0.2,bias=1.0`."""
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method}:{options}" if options else self.method


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """What changes the model's next token least; see `vitcop.calibration.choice`.

    Attributes:
        retention_ratio: at which it was measured.
        sure: share of bootstrap samples of the clips in which it is the best of all presets.
        divergences: mean divergence of each preset, in nats, by its name.
    """

    preset: Preset
    retention_ratio: float
    sure: float
    divergences: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, repr=False)
class Profile:
    """The measurements and recommendations of calibration for one model.

    Attributes:
        model: as it was named.
        clips, frames, visual_tokens: how much was measured; frames and tokens of the first clip.
        layers: for each layer but the first, in order.
        shallow, deep: recommended for ViTCoP's stages II and III.
        choice: the recommended method and its settings; None if none was chosen.
    """

    model: str
    model_type: str
    num_layers: int
    clips: int
    frames: int
    visual_tokens: int
    layers: tuple[LayerProfile, ...]
    shallow: StageProfile
    deep: StageProfile
    choice: MethodChoice | None = None

    def __repr__(self) -> str:
        stages = (f"{stage.key_score} before layer {stage.layer}" for stage in (self.shallow, self.deep))
        return f"Profile({self.model!r}, {self.clips} clips: {', '.join(stages)})"

    def best(self, layer: int) -> KeyScore:
        """The key score for a stage before `layer`."""
        return self.layers[layer - 1].best

    def check(self, num_layers: int) -> None:
        """Raise ProfileError unless the profile is of a model with `num_layers` layers."""
        if self.num_layers != num_layers:
            raise ProfileError(
                f"the profile of {self.model!r} is for {self.num_layers} layers, this model has {num_layers}; "
                f"calibrate this one: {COMMAND} --model MODEL --videos VIDEO ..."
            )

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: no such file, or no profile in it.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content.pop("format") != FORMAT:
                raise ProfileError(f"{path}: not format {FORMAT}; calibrate again with {COMMAND}")
            return cls(
                **content
                | {
                    "layers": tuple(_layer(layer) for layer in content["layers"]),
                    "shallow": StageProfile(**content["shallow"]),
                    "deep": StageProfile(**content["deep"]),
                    "choice": _choice(content.get("choice")),
                }
            )
        except (OSError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ProfileError(f"{path}: no profile that can be read ({error!r})") from error


def _layer(content: Mapping[str, Any]) -> LayerProfile:
    return LayerProfile(layer=content["layer"], **{score: Estimate(**content[score]) for score in KEY_SCORES})


def _choice(content: Mapping[str, Any] | None) -> MethodChoice | None:
    return None if content is None else MethodChoice(**{**content, "preset": Preset(**content["preset"])})


def find_profile(model: PreTrainedModel, needed_by: str) -> Profile:
    """The profile that lies in the folder a model was loaded from.

    Args:
        needed_by: the setting that asks for it, for the message.

    Raises:
        ProfileError: there is none.
    """
    name = getattr(model.config, "_name_or_path", "")
    path = Path(name) / FILE_NAME
    if not name or not path.is_file():
        raise ProfileError(
            f"{needed_by} needs a profile, and there is no {path if name else FILE_NAME}; make one with "
            f"{COMMAND} --model {name or 'MODEL'} --videos VIDEO ..."
        )
    return Profile.load(path)
