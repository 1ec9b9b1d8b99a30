"""The Qwen families: frames of many sizes, cut into patches of space and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from pipeline.model.frames.base import CLIP, HALF, FrameProcessor, Inputs, Settings, channel_scale
from pipeline.video.size import QwenClipSize, QwenFrameSize


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
        mean, std = channel_scale(settings)
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
        # Frames that lack to a whole temporal patch.
        missing = -len(pixels) % time
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])  # the last frame fills the last patch
        # H = h * merge * patch, W = w * merge * patch, T = t * time
        patches = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch)).unflatten(0, (-1, time))
        # (t, time, 3, h, merge, patch, w, merge, patch) -> (t, h, w, merge, merge, 3, time, patch, patch)
        flat = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * time * patch * patch)
        # (1, 3): the model counts in patches, before 2x2 of them are merged into a token.
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
        # Mean seconds from one frame to the next; a temporal patch spans several frames.
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
        # (grid_t,) seconds; the last patch may have fewer frames, as its own last one is repeated.
        middle = [(times[start] + times[min(start + step, len(times)) - 1]) / 2 for start in starts]
        tokens = self.visual_token * (self.num_visual_tokens(inputs) // len(middle))
        return "".join(f"<{seconds:.1f} seconds><|vision_start|>{tokens}<|vision_end|>" for seconds in middle)


def _bound(settings: Settings, name: str, edge: str) -> int:
    """A bound on pixels; older Qwen checkpoints keep it beside the size, or in it under the same name."""
    size = settings["size"]
    return settings.get(name) or size.get(edge) or size[name]
