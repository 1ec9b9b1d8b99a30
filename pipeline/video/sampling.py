"""Which frames of a video to look at."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.video.container import VideoError, VideoInfo

_CLOCK_TOLERANCE = 1e-6  # seconds; a time read from text is seldom the same float as pts * time_base
_MAX_FPS = 1000
MOST_REQUESTED = 10_000_000
"""More frames than this are not asked for by `fps`."""

Mode = Literal["uniform", "keyframes"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose frames: exactly one of `num_frames` and `fps`.

    Attributes:
        num_frames: this many frames, evenly spread over the frames of the span, its first and last included; a single
            frame is the middle one.
        fps: one frame every 1/fps seconds of the video's own time, from the span's first frame on; 1000 at most.
        max_frames: never more frames than this; the chosen ones are thinned evenly.
        start, end: the span in seconds on the file's own clock, both ends included; None is the video's own end. A span
            that falls between two frames takes the frame on screen at `start`.
        min_frames: fewer whole frames than this are an error.
        mode: "keyframes" takes, instead of each frame so chosen, the keyframe of the span nearest to it in time, each
            keyframe once. That is much cheaper to decode. Where it would leave less than half of the frames, or less
            than `min_frames`, the sampling stays uniform.

    Raises:
        ValueError: settings that contradict each other or can select nothing.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    min_frames: int = 1
    mode: Mode = "uniform"

    def __post_init__(self) -> None:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(f"give either num_frames or fps, not num_frames={self.num_frames} and fps={self.fps}")
        for name in ("num_frames", "fps", "max_frames", "min_frames"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if self.fps is not None and self.fps > _MAX_FPS:
            raise ValueError(f"fps={self.fps} must be {_MAX_FPS} at most")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(f"end={self.end} must be after start={self.start}")
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < self.min_frames:
                raise ValueError(f"{name}={value} is below min_frames={self.min_frames}")


def sample_indices(info: VideoInfo, sampling: Sampling) -> tuple[np.ndarray, int]:
    """Choose frames.

    Returns:
        Frame indices, ascending and distinct, int64; and the number of frames asked for, which is larger when the span
        has fewer.

    Raises:
        VideoError: span_outside when the span misses the video; untimed when there is a span but no clock that can be
            trusted; too_many_frames when `fps` asks for more than `MOST_REQUESTED`.
    """
    first, last = _span(info, sampling)
    if sampling.num_frames is not None:
        indices, requested = np.arange(first, last + 1), sampling.num_frames
    else:
        assert sampling.fps is not None
        times = info.timestamps[first : last + 1]
        requested = int((times[-1] - times[0]) * sampling.fps + _CLOCK_TOLERANCE) + 1
        if requested > MOST_REQUESTED:
            raise VideoError(
                "too_many_frames",
                f"{info.path}: fps={sampling.fps:g} asks for {requested:,} frames of its {times[-1] - times[0]:g} s, "
                f"more than {MOST_REQUESTED:,}; a time stamp may be damaged: ask for a number of frames instead",
            )
        indices = first + _at_rate(times, sampling.fps, requested)
    # (T,) the frames of uniform sampling, before they give way to keyframes
    indices = _spread(indices, min(requested, sampling.max_frames or requested))
    if sampling.mode == "keyframes":
        keyframes = info.keyframes[(info.keyframes >= first) & (info.keyframes <= last)]
        indices = _at_keyframes(info.timestamps, indices, keyframes, sampling.min_frames)
    return indices, requested


def _at_rate(times: np.ndarray, fps: float, count: int) -> np.ndarray:
    """The frames nearest to `count` ticks, one every 1/fps seconds from the first frame on."""
    # A frame that is nearest to any tick is nearest to the one before it or after it, so the other ticks, of which a
    # damaged time stamp can make very many, need not be made. One more on each side makes up for rounding.
    ticks = np.floor((times - times[0]) * fps)[:, None] + np.arange(-1, 3)
    return np.unique(_nearest(times, times[0] + np.unique(ticks.clip(0, count - 1)) / fps))


def _at_keyframes(times: np.ndarray, indices: np.ndarray, keyframes: np.ndarray, least: int) -> np.ndarray:
    """The keyframes nearest to some frames; these frames themselves where the keyframes are too few."""
    if not len(keyframes):
        return indices
    nearest = keyframes[np.unique(_nearest(times[keyframes], times[indices]))]
    return nearest if len(nearest) >= max(least, len(indices) / 2) else indices


def _span(info: VideoInfo, sampling: Sampling) -> tuple[int, int]:
    """First and last frame index of the span."""
    if not info.index.clock and (sampling.start, sampling.end) != (None, None):
        raise VideoError(
            "untimed",
            f"{info.path}: its time stamps contradict each other, so that start={sampling.start}, end={sampling.end} s "
            "cannot be found; ask about the whole video, or remux the file",
        )
    times = info.timestamps
    start = times[0] if sampling.start is None else sampling.start
    end = times[-1] if sampling.end is None else sampling.end
    if start > times[0] + info.duration or end < times[0] - _CLOCK_TOLERANCE:
        raise VideoError(
            "span_outside",
            f"{info.path}: start={sampling.start}, end={sampling.end} s is outside the video, "
            f"which runs from {times[0]:g} to {times[0] + info.duration:g} s",
        )
    first = int(np.searchsorted(times, start - _CLOCK_TOLERANCE))
    last = int(np.searchsorted(times, end + _CLOCK_TOLERANCE, side="right")) - 1
    # A span between two frames holds none: the frame before it is the one on screen.
    return (first, last) if first <= last else (last, last)


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the indices, evenly spread, first and last included (the middle one when count is 1)."""
    if count >= len(indices):
        return indices.astype(np.int64)
    places = np.linspace(0, len(indices) - 1, count) if count > 1 else np.array([(len(indices) - 1) / 2])
    return indices[places.round().astype(np.int64)]


def _nearest(times: np.ndarray, ticks: np.ndarray) -> np.ndarray:
    """For each tick the index of the frame whose time is nearest; the earlier of two equally near."""
    right = np.searchsorted(times, ticks).clip(1, max(1, len(times) - 1))
    right = np.minimum(right, len(times) - 1)
    left = np.maximum(right - 1, 0)
    nearest: np.ndarray = np.where(ticks - times[left] <= times[right] - ticks, left, right)
    return nearest
