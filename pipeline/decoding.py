"""A clip's frames as the settings ask for them; runs in the decoding processes, which load no torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import FrameConfig
from pipeline.errors import RowError
from pipeline.manifest import Clip
from pipeline.video import DecodedVideo, Size, VideoError, decode_each
from pipeline.video.sampling import Sampling


@dataclass(frozen=True)
class TimedVideo:
    """Frames, and the seconds that it took to make them."""

    video: DecodedVideo
    seconds: float


def decode_clip(clip: Clip, frames: FrameConfig, size: Size | None) -> TimedVideo:
    """The frames of a clip that the settings ask for.

    Raises:
        RowError: `video_...`, the video can't be used.
    """
    (video,) = decode_samplings(clip, [frames], size)
    return video


def decode_samplings(clip: Clip, settings: Sequence[FrameConfig], size: Size | None) -> list[TimedVideo]:
    """The frames of a clip as each of several settings with one decoder asks for them, from one pass over the file.

    Raises:
        RowError: `video_...`, the video can't be used as one of them asks.
    """
    began = time.perf_counter()
    samplings = [
        Sampling(
            num_frames=frames.uniform_frames,
            fps=frames.fps,
            max_frames=frames.max_frames,
            min_frames=frames.min_frames,
            start=clip.start,
            end=clip.end,
        )
        for frames in settings
    ]
    try:
        videos = decode_each(clip.path, samplings, size, settings[0].decoder)
    except VideoError as error:
        raise RowError(f"video_{error.kind}", error.message) from error
    seconds = time.perf_counter() - began
    return [TimedVideo(video, seconds) for video in videos]
