"""The size at which a model takes its frames, from the size of the source.

Each rule is a picklable function of (height, width, num_frames) without torch, so that decoding processes can apply it.
"""

import math
from dataclasses import dataclass

Size = tuple[int, int]
LONGEST_SHAPE = 200  # Qwen's limit on longer side : shorter side


class ShapeError(ValueError):
    """A picture too narrow for the model."""


@dataclass(frozen=True)
class SourceSize:
    """Frames keep their size."""

    def __call__(self, height: int, width: int, num_frames: int) -> Size:
        return height, width


@dataclass(frozen=True)
class FixedSize:
    """Every frame gets this size, whatever its shape."""

    height: int
    width: int

    def __call__(self, height: int, width: int, num_frames: int) -> Size:
        return self.height, self.width


@dataclass(frozen=True)
class ShortestEdge:
    """The shorter side gets this length, the shape stays."""

    edge: int

    def __call__(self, height: int, width: int, num_frames: int) -> Size:
        if height <= width:
            return self.edge, int(self.edge * width / height)
        return int(self.edge * height / width), self.edge


@dataclass(frozen=True, kw_only=True)
class QwenFrameSize:
    """Qwen2-VL and Qwen2.5-VL: sides are multiples of `factor`, and the pixels of a frame stay within bounds.

    Attributes:
        factor: patch_size * merge_size.
        min_pixels, max_pixels: bounds on height * width.
        temporal_patch_size: frames that make one patch in time.
        max_video_tokens: with `cap_pixels_per_frame`, 90 % of this many visual tokens are shared out evenly to the
            frames; None where the checkpoint does not cap.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    temporal_patch_size: int
    max_video_tokens: int | None = None

    def __call__(self, height: int, width: int, num_frames: int) -> Size:
        most = self.max_pixels
        if self.max_video_tokens is not None:
            total = int(self.max_video_tokens * self.factor**2 * 0.9)
            share = total * self.temporal_patch_size // num_frames
            most = max(min(most, share), int(self.min_pixels * 1.05))
        return _fit(height, width, self.factor, self.min_pixels, most)


@dataclass(frozen=True, kw_only=True)
class QwenClipSize:
    """Qwen3-VL: sides are multiples of `factor`, and the pixels of the whole clip stay within bounds.

    Attributes:
        factor: patch_size * merge_size.
        min_pixels, max_pixels: bounds on num_frames * height * width.
        temporal_patch_size: frames that make one patch in time; the clip is padded to a multiple of it.
        max_video_tokens: with `cap_pixels_per_frame`, the most visual tokens of one frame; None for no such cap.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    temporal_patch_size: int
    max_video_tokens: int | None = None

    def __call__(self, height: int, width: int, num_frames: int) -> Size:
        frames = max(num_frames, self.temporal_patch_size)
        most = self.max_pixels
        if self.max_video_tokens is not None:
            share = min(self.max_video_tokens * self.factor**2, most // frames)
            most = max(share, int(self.min_pixels * 1.05)) * frames
        if min(height, width) < self.factor:
            scale = max(self.factor / height, self.factor / width)
            height, width = int(height * scale), int(width * scale)
        rounded = round(frames / self.temporal_patch_size) * self.temporal_patch_size
        return _fit(height, width, self.factor, self.min_pixels, most, frames, rounded)


def _fit(height: int, width: int, factor: int, least: int, most: int, frames: int = 1, rounded: int = 1) -> Size:
    """Round both sides to multiples of `factor`; scale them when that leaves `least` to `most` pixels.

    `rounded` frames are what the bounds are checked with, `frames` what the scale is computed with.
    """
    if max(height, width) > LONGEST_SHAPE * min(height, width):
        raise ShapeError(f"a {height}x{width} picture is longer than {LONGEST_SHAPE}:1; crop the video")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    pixels = frames * height * width
    # Divided and multiplied in the order of the published rule, as rounding up or down hangs on the last bit.
    if rounded * tall * wide > most:
        shrink = math.sqrt(pixels / most)
        sides = (math.floor(height / shrink / factor), math.floor(width / shrink / factor))
        return max(1, sides[0]) * factor, max(1, sides[1]) * factor
    if rounded * tall * wide < least:
        grow = math.sqrt(least / pixels)
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return tall, wide
