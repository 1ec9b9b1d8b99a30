"""From uint8 frames to a video language model's visual inputs, without torchvision.

A `FrameProcessor` is read from a checkpoint folder. It knows the size at which frames must be decoded, normalises and
patchifies them on whatever device they are on, and writes the text that stands for the video in a prompt. Arrays equal
those of the video processors of transformers on frames that already have the model's size.
"""

import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig

from pipeline.errors import ConfigError
from pipeline.video.size import FixedSize, QwenClipSize, QwenFrameSize, ShortestEdge, Size, SourceSize

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
    """The frames of one model; build it with `from_pretrained`.

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
    checkpoint_processor: Callable[..., Mapping[str, Any]] | None = None

    # What a checkpoint's settings leave out: the defaults of the family's video processor in transformers.
    defaults: ClassVar[Settings] = CLIP

    @staticmethod
    def from_pretrained(folder: str | Path, resize: Literal["decoder", "processor"] = "decoder") -> "FrameProcessor":
        """Read a checkpoint folder's config.json and its video processor's settings.

        Args:
            resize: "processor" leaves resizing to the checkpoint's own processor, which needs torchvision; frames are
                then decoded at the source's size.

        Raises:
            ConfigError: the model type is not supported, a file is missing, or torchvision is.
        """
        folder = Path(folder)
        model_type = _read_json(folder / "config.json").get("model_type")
        if model_type not in FAMILIES:
            raise ConfigError(f"{folder}: frames for {model_type!r} are not supported, only for {', '.join(FAMILIES)}")
        family = FAMILIES[model_type]
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        processor = family.from_settings(config, {**family.defaults, **_video_settings(folder)})
        if resize == "decoder":
            return processor
        own = _load_checkpoint_processor(folder)
        return replace(processor, frame_size=SourceSize(), crop=None, checkpoint_processor=own)

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
        pixels = frames.permute(0, 3, 1, 2)
        if self.checkpoint_processor is None:
            inputs = self.arrange(self._normalise(pixels))
        else:
            inputs = dict(self.checkpoint_processor(videos=[pixels], do_sample_frames=False, return_tensors="pt"))
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
        mean, std = _scale(settings)
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


@dataclass(frozen=True, kw_only=True)
class PatchedFrames(FrameProcessor):
    """Qwen2-VL: frames of many sizes, cut into patches of space and time.

    Pixels are (grid_t * grid_h * grid_w, 3 * temporal_patch_size * patch_size**2), the patches of one merged token
    behind each other; `video_grid_thw` (1, 3) holds the grid.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int

    text: ClassVar[str] = "<|video_pad|>"
    size_rule: ClassVar[type[QwenFrameSize] | type[QwenClipSize]] = QwenFrameSize
    defaults: ClassVar[Settings] = {
        **CLIP,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
        "max_video_tokens": 128_000,
    }

    @classmethod
    def from_settings(cls, config: PretrainedConfig, settings: Settings) -> "PatchedFrames":
        vision = config.vision_config
        patch = settings.get("patch_size", vision.patch_size)
        merge = settings.get("merge_size", vision.spatial_merge_size)
        time = settings.get("temporal_patch_size", vision.temporal_patch_size)
        mean, std = _scale(settings)
        return cls(
            model_type=config.model_type,
            frame_size=cls.size_rule(
                factor=patch * merge,
                min_pixels=_bound(settings, "min_pixels", "shortest_edge"),
                max_pixels=_bound(settings, "max_pixels", "longest_edge"),
                temporal_patch_size=time,
                max_video_tokens=settings["max_video_tokens"] if settings.get("cap_pixels_per_frame") else None,
            ),
            crop=None,
            mean=mean,
            std=std,
            video_text=cls.text,
            visual_token="<|video_pad|>",
            patch_size=patch,
            merge_size=merge,
            temporal_patch_size=time,
        )

    def arrange(self, pixels: Tensor) -> Inputs:
        time, patch, merge = self.temporal_patch_size, self.patch_size, self.merge_size
        height, width = pixels.shape[-2:]
        if height % (patch * merge) or width % (patch * merge):
            raise ValueError(f"{self.model_type} takes frames in multiples of {patch * merge}, got {height}x{width}")
        missing = -len(pixels) % time
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])  # the last frame fills the last patch
        patches = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch)).unflatten(0, (-1, time))
        # (t, time, 3, h, merge, patch, w, merge, patch) -> (t, h, w, merge, merge, 3, time, patch, patch)
        flat = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * time * patch * patch)
        grid = [[len(pixels) // time, height // patch, width // patch]]
        return {"pixel_values_videos": flat, "video_grid_thw": torch.tensor(grid, device=pixels.device)}

    def num_visual_tokens(self, inputs: Inputs) -> int:
        return len(inputs["pixel_values_videos"]) // self.merge_size**2

    def frame_times(self, times: Sequence[float] | None) -> Sequence[float]:
        """`times`, which this family cannot do without."""
        if times is None:
            raise ValueError(f"{self.model_type} places frames in time: give the seconds of each frame as `times`")
        return times


class Qwen25VLFrames(PatchedFrames):
    """As Qwen2-VL, with the seconds from one temporal patch to the next."""

    def to_model_inputs(
        self, frames: Tensor, times: Sequence[float] | None = None, dtype: torch.dtype = torch.float32
    ) -> Inputs:
        """Adds `second_per_grid_ts`, from the mean distance between frames; without meaning for a single frame."""
        times = self.frame_times(times)
        between = (times[-1] - times[0]) / max(1, len(times) - 1)
        inputs = super().to_model_inputs(frames, times, dtype)
        return inputs | {"second_per_grid_ts": [between * self.temporal_patch_size]}


class Qwen3VLFrames(PatchedFrames):
    """Each temporal patch stands alone, behind its time in words.

    The words replace the marks that the chat template puts around a video too, as in the processor that the models were
    published with.
    """

    text: ClassVar[str] = "<|vision_start|><|video_pad|><|vision_end|>"
    size_rule: ClassVar[type[QwenFrameSize] | type[QwenClipSize]] = QwenClipSize
    defaults: ClassVar[Settings] = {
        **HALF,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "max_video_tokens": 768,
    }

    def placeholders(self, inputs: Inputs, times: Sequence[float] | None = None) -> str:
        """For each temporal patch the mean time of its first and last frame, and its tokens."""
        times, step = self.frame_times(times), self.temporal_patch_size
        starts = range(0, len(times), step)
        middle = [(times[start] + times[min(start + step, len(times)) - 1]) / 2 for start in starts]
        tokens = self.visual_token * (self.num_visual_tokens(inputs) // len(middle))
        return "".join(f"<{seconds:.1f} seconds><|vision_start|>{tokens}<|vision_end|>" for seconds in middle)


FAMILIES: dict[str, type[FrameProcessor]] = {
    "llava_onevision": LlavaOnevisionFrames,
    "llava_next_video": LlavaNextVideoFrames,
    "video_llava": VideoLlavaFrames,
    "internvl": InternVLFrames,
    "qwen2_vl": PatchedFrames,
    "qwen2_5_vl": Qwen25VLFrames,
    "qwen3_vl": Qwen3VLFrames,
    "qwen3_vl_moe": Qwen3VLFrames,
}


def _video_settings(folder: Path) -> dict[str, Any]:
    """The video processor's settings, from where transformers looks for them, in its order."""
    processor = folder / "processor_config.json"
    if processor.is_file() and "video_processor" in (settings := _read_json(processor)):
        return settings["video_processor"]
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            return _read_json(folder / name)
    raise ConfigError(f"{folder}: neither video_preprocessor_config.json nor preprocessor_config.json is there")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _load_checkpoint_processor(folder: Path) -> Callable[..., Mapping[str, Any]]:
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError("--resize processor needs torchvision, which is not installed; use --resize decoder")
    from transformers import AutoVideoProcessor

    return AutoVideoProcessor.from_pretrained(folder, trust_remote_code=False)


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


def _bound(settings: Settings, name: str, edge: str) -> int:
    """A bound on pixels; older Qwen checkpoints keep it beside the size, or in it under the same name."""
    size = settings["size"]
    return settings.get(name) or size.get(edge) or size[name]


def _crop(settings: Settings) -> Size | None:
    size = settings.get("crop_size")
    if not settings.get("do_center_crop") or not size:
        return None
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _scale(settings: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation in units of the stored 0 .. 255."""
    unit = 1 / settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    if not settings.get("do_normalize", True):
        return (0.0,) * 3, (unit,) * 3
    return tuple(value * unit for value in settings["image_mean"]), tuple(v * unit for v in settings["image_std"])


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle out of (..., H, W); where a side is too short, pad it with zeros."""
    margins = []
    for present, wanted in ((pixels.shape[-1], width), (pixels.shape[-2], height)):
        before = -((present - wanted) // 2) if present >= wanted else (wanted - present) // 2
        margins += [before, wanted - present - before]
    return functional.pad(pixels, margins)


def _square(size: int | Sequence[int]) -> int:
    """One side of a square given as one number or two."""
    return size if isinstance(size, int) else size[0]
