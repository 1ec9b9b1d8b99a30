"""Which frames of a video to look at."""

from dataclasses import dataclass

import numpy as np

from pipeline.video.container import VideoError, VideoInfo

_CLOCK_TOLERANCE = 1e-6  # seconds; a time read from text is seldom the same float as pts * time_base
_MAX_FPS = 1000


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

    Raises:
        ValueError: settings that contradict each other or can select nothing.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    min_frames: int = 1

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
        VideoError: span_outside when the span misses the video.
    """
    first, last = _span(info, sampling)
    if sampling.num_frames is not None:
        wanted = min(sampling.num_frames, sampling.max_frames or sampling.num_frames)
        return _spread(np.arange(first, last + 1), wanted), sampling.num_frames
    assert sampling.fps is not None
    times = info.timestamps[first : last + 1]
    steps = int((times[-1] - times[0]) * sampling.fps + _CLOCK_TOLERANCE) + 1
    ticks = times[0] + np.arange(steps) / sampling.fps
    nearest = np.unique(first + _nearest(times, ticks))
    return _spread(nearest, sampling.max_frames or len(nearest)), steps


def _span(info: VideoInfo, sampling: Sampling) -> tuple[int, int]:
    """First and last frame index of the span."""
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
    return np.where(ticks - times[left] <= times[right] - ticks, left, right)
