"""From uint8 frames to a video language model's visual inputs, without torchvision.

A `FrameProcessor` is read from a checkpoint folder. It knows the size at which frames must be decoded, normalises and
patchifies them on whatever device they are on, and writes the text that stands for the video in a prompt. Arrays equal
those of the video processors of transformers on frames that already have the model's size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from pipeline.video.size import Size

CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}

FrameSize = Callable[[int, int, int], Size]
Inputs = dict[str, Any]
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FrameProcessor(ABC):
    """The frames of one model; build it with `load_frame_processor`.

    Attributes:
        model_type: as in the checkpoint's config.json.
        frame_size: the size to decode at, a picklable function of (height, width, num_frames) that needs no torch.
        crop: (height, width) cut from the middle of each decoded frame; None for none.
        mean, std: of each channel, in units of 0 .. 255.
        video_text: what the chat template writes for a video, and `placeholders` replaces.
        visual_token: the token that stands for one visual token.
        checkpoint_processor: with `resize="processor"`, the checkpoint's own video processor.
    """

    model_type: str
    frame_size: FrameSize
    crop: Size | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    video_text: str
    visual_token: str
    checkpoint_processor: Callable[..., Inputs] | None = None

    # What a checkpoint's settings leave out: the defaults of the family's video processor in transformers.
    defaults: ClassVar[Settings] = CLIP

    @classmethod
    @abstractmethod
    def from_settings(cls, config: PretrainedConfig, settings: Settings) -> "FrameProcessor":
        """Build from a model's config and its video processor's settings."""

    def to_model_inputs(
        self, frames: Tensor, times: Sequence[float] | None = None, dtype: torch.dtype = torch.float32
    ) -> Inputs:
        """The model's keyword arguments for one clip.

        Args:
            frames: (T, H, W, 3) uint8 on any device, decoded at `frame_size`.
            times: (T,) seconds of each frame from the start of the video; needed by families that place frames in time.
            dtype: of the pixels; the arithmetic is float32.

        Raises:
            ValueError: frames of another type, shape or size than the model takes, or missing times.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
            raise ValueError(f"frames must be (T, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
        # (T, 3, H, W)
        pixels = frames.permute(0, 3, 1, 2)
        if self.checkpoint_processor is None:
            inputs = self.arrange(self._normalise(pixels))
        else:
            inputs = dict(self.checkpoint_processor(videos=[pixels], do_sample_frames=False, return_tensors="pt"))
        # Cast last: in bfloat16 the normalisation itself would lose digits.
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
        return inputs

    @abstractmethod
    def arrange(self, pixels: Tensor) -> Inputs:
        """Lay normalised pixels (T, 3, H, W) out for the model."""

    @abstractmethod
    def num_visual_tokens(self, inputs: Inputs) -> int:
        """How many placeholder tokens the prompt must hold for `inputs`."""

    def placeholders(self, inputs: Inputs, times: Sequence[float] | None = None) -> str:
        """The text to put in place of `video_text` in a rendered prompt; `times` as for `to_model_inputs`."""
        return self.visual_token * self.num_visual_tokens(inputs)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Crop and normalise (T, 3, H, W) uint8 -> float32; rescaling is folded in, as transformers does."""
        if self.crop is not None:
            pixels = _center_crop(pixels, *self.crop)
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() - mean) / std


def channel_scale(settings: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation in units of the stored 0 .. 255."""
    # Pixels stay 0 .. 255, so mean and deviation grow by 255 instead of every pixel being divided.
    unit = 1 / settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    if not settings.get("do_normalize", True):
        return (0.0,) * 3, (unit,) * 3
    return tuple(value * unit for value in settings["image_mean"]), tuple(v * unit for v in settings["image_std"])


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle out of (..., H, W); where a side is too short, pad it with zeros."""
    # Widths first, as `pad` counts from the last axis; negative margins cut.
    margins = []
    for present, wanted in ((pixels.shape[-1], width), (pixels.shape[-2], height)):
        before = -((present - wanted) // 2) if present >= wanted else (wanted - present) // 2
        margins += [before, wanted - present - before]
    return functional.pad(pixels, margins)
