"""A clip's frames as the settings ask for them; runs in the decoding processes, which load no torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from pipeline.config import FrameConfig
from pipeline.errors import RowError
from pipeline.manifest import Clip
from pipeline.video import DecodedVideo, Size, VideoError, decode_windows
from pipeline.video.sampling import Sampling


@dataclass(frozen=True)
class TimedVideo:
    """Frames, and the seconds that it took to make them."""

    video: DecodedVideo
    seconds: float

    def without_frames(self) -> Self:
        """The same without the pictures, for when the model has them."""
        return replace(self, video=replace(self.video, frames=np.empty((0, 0, 0, 3), np.uint8)))


def decode_clip(clip: Clip, frames: FrameConfig, size: Size | None, *, again: bool = False) -> TimedVideo:
    """The frames of a clip that the settings ask for.

    Args:
        again: as in `decode_samplings`.

    Raises:
        RowError: `video_...`, the video can't be used.
    """
    (video,) = decode_samplings(clip, [frames], size, again=again)
    return video


def decode_samplings(
    clip: Clip, settings: Sequence[FrameConfig], size: Size | None, *, again: bool = False
) -> list[TimedVideo]:
    """The frames of a clip as each of several settings with one decoder asks for them, from one pass over the file.

    Args:
        again: the process that tried before was lost. decord can abort its process on files that PyAV reads, so PyAV
            decodes now, unless the settings insist on decord.

    Raises:
        RowError: `video_...`, the video can't be used as one of them asks.
    """
    if again:
        settings = [replace(each, decoder="pyav") if each.decoder == "auto" else each for each in settings]
    videos, seconds = _decode(clip.path, [(clip, frames) for frames in settings], size)
    # One sampling that can't be had fails the clip: a sweep compares settings on the same clips.
    for video in videos:
        if isinstance(video, VideoError):
            raise _row_error(video) from video
    return [TimedVideo(video, seconds) for video in videos if isinstance(video, DecodedVideo)]


def decode_clips(clips: Sequence[Clip], frames: FrameConfig, size: Size | None) -> list[TimedVideo | RowError]:
    """The frames of several clips of one file, or the error of each that has none, from one pass over the file.

    Clips of the same span share their frames. The seconds of the pass are shared out evenly.
    """
    try:
        videos, seconds = _decode(clips[0].path, [(clip, frames) for clip in clips], size)
    except RowError as error:
        return [error] * len(clips)
    return [
        _row_error(video) if isinstance(video, VideoError) else TimedVideo(video, seconds / len(clips))
        for video in videos
    ]


def _decode(
    path: str, requests: Sequence[tuple[Clip, FrameConfig]], size: Size | None
) -> tuple[list[DecodedVideo | VideoError], float]:
    """Each span as its settings ask for it, and the seconds of the pass.

    Raises:
        RowError: the file can't be used at all.
    """
    began = time.perf_counter()
    # One sampling for each request; the file is read once for all of them.
    samplings = [
        Sampling(
            num_frames=frames.uniform_frames,
            fps=frames.fps,
            max_frames=frames.max_frames,
            min_frames=frames.min_frames,
            start=clip.start,
            end=clip.end,
            mode=frames.sampling,
        )
        for clip, frames in requests
    ]
    _, settings = requests[0]
    # GiB in the settings, bytes in the decoder.
    most_bytes = int(settings.decode_memory * 2**30)
    try:
        videos = decode_windows(path, samplings, size, settings.decoder, settings.decode_threads, most_bytes)
    except VideoError as error:
        raise _row_error(error) from error
    return videos, time.perf_counter() - began


def _row_error(error: VideoError) -> RowError:
    return RowError(f"video_{error.kind}", error.message)
