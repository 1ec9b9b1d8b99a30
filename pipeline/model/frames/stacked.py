"""Families that see each frame as one picture of a fixed size."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from pipeline.errors import ConfigError
from pipeline.model.frames.base import CLIP, FrameProcessor, FrameSize, Inputs, Settings, channel_scale
from pipeline.video.size import FixedSize, ShortestEdge, Size, SourceSize


@dataclass(frozen=True, kw_only=True)
class StackedFrames(FrameProcessor):
    """Families that see a frame as one picture of a fixed size: pixels (1, T, 3, side, side).

    Attributes:
        side: height and width that the vision tower takes.
        tokens_per_frame: visual tokens of one frame.
    """

    side: int
    tokens_per_frame: int

    token: ClassVar[str] = "<video>"
    extra_tokens: ClassVar[int] = 0  # placeholders beyond those of the frames

    @classmethod
    def from_settings(cls, config: PretrainedConfig, settings: Settings) -> "StackedFrames":
        vision = config.vision_config
        side = _square(vision.image_size)
        mean, std = channel_scale(settings)
        return cls(
            model_type=config.model_type,
            frame_size=_picture_size(settings),
            crop=_crop(settings),
            mean=mean,
            std=std,
            video_text="<video>",
            visual_token=cls.token,
            side=side,
            tokens_per_frame=cls.count_tokens(config, side // _square(vision.patch_size)),
        )

    @staticmethod
    @abstractmethod
    def count_tokens(config: PretrainedConfig, grid: int) -> int:
        """Visual tokens of a frame that the vision tower cuts into `grid` x `grid` patches."""

    def arrange(self, pixels: Tensor) -> Inputs:
        if pixels.shape[-2:] != (self.side, self.side):
            height, width = pixels.shape[-2:]
            raise ValueError(f"{self.model_type} takes {self.side}x{self.side} frames, got {height}x{width}")
        # (1, T, 3, side, side): a batch of one clip
        return {"pixel_values_videos": pixels[None]}

    def num_visual_tokens(self, inputs: Inputs) -> int:
        return inputs["pixel_values_videos"].shape[1] * self.tokens_per_frame + self.extra_tokens


class LlavaOnevisionFrames(StackedFrames):
    """Half the patch grid, rounded up, for each frame, and one newline at the end."""

    defaults: ClassVar[Settings] = {**CLIP, "size": {"height": 384, "width": 384}}
    extra_tokens: ClassVar[int] = 1

    @staticmethod
    def count_tokens(config: PretrainedConfig, grid: int) -> int:
        return math.ceil(grid / 2) ** 2


class LlavaNextVideoFrames(StackedFrames):
    """The patch grid, pooled by the config's stride (2), for each frame."""

    defaults: ClassVar[Settings] = {
        **CLIP,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }

    @staticmethod
    def count_tokens(config: PretrainedConfig, grid: int) -> int:
        return (grid // config.spatial_pool_stride) ** 2


class VideoLlavaFrames(StackedFrames):
    """The patch grid and the CLS token for each frame."""

    defaults: ClassVar[Settings] = LlavaNextVideoFrames.defaults

    @staticmethod
    def count_tokens(config: PretrainedConfig, grid: int) -> int:
        return grid**2 + 1


class InternVLFrames(StackedFrames):
    """Named frames, each a picture of its own: pixels (T, 3, side, side)."""

    defaults: ClassVar[Settings] = LlavaOnevisionFrames.defaults
    token: ClassVar[str] = "<IMG_CONTEXT>"

    @staticmethod
    def count_tokens(config: PretrainedConfig, grid: int) -> int:
        return round(grid * config.downsample_ratio) ** 2

    def to_model_inputs(
        self, frames: Tensor, times: Sequence[float] | None = None, dtype: torch.dtype = torch.float32
    ) -> Inputs:
        """As for the other families; the model takes a clip's frames as `pixel_values`."""
        return {"pixel_values": super().to_model_inputs(frames, times, dtype)["pixel_values_videos"][0]}

    def num_visual_tokens(self, inputs: Inputs) -> int:
        return len(inputs["pixel_values"]) * self.tokens_per_frame

    def placeholders(self, inputs: Inputs, times: Sequence[float] | None = None) -> str:
        frame = f"<img>{self.visual_token * self.tokens_per_frame}</img>"
        return "\n".join(f"Frame{number}: {frame}" for number in range(1, len(inputs["pixel_values"]) + 1))


def _picture_size(settings: Settings) -> FrameSize:
    """The resize of a family whose pictures have one size."""
    size = settings["size"]
    if not settings.get("do_resize", True):
        return SourceSize()
    if isinstance(size, int):
        return ShortestEdge(size)
    if size.get("height") and size.get("width"):
        return FixedSize(size["height"], size["width"])
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return ShortestEdge(size["shortest_edge"])
    raise ConfigError(f"the video processor's size is {size!r}; it must give height and width, or shortest_edge")


def _crop(settings: Settings) -> Size | None:
    size = settings.get("crop_size")
    if not settings.get("do_center_crop") or not size:
        return None
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _square(size: int | Sequence[int]) -> int:
    """One side of a square given as one number or two."""
    return size if isinstance(size, int) else size[0]
