"""The stages of a clip: from its file to frames, and from frames to the answer columns of its rows."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import FrameConfig
from pipeline.errors import RowError
from pipeline.manifest import Clip
from pipeline.video import DecodedVideo, Sampling, Size, VideoError, decode_each

if TYPE_CHECKING:  # torch stays out of the processes that decode
    from pipeline.answers import Answer


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
    (video,) = decode_ways(clip, [frames], size)
    return video


def decode_ways(clip: Clip, ways: Sequence[FrameConfig], size: Size | None) -> list[TimedVideo]:
    """The frames of a clip as each of several settings with one decoder asks for them, from one pass over the file.

    Raises:
        RowError: `video_...`, the video can't be used in one of these ways.
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
        for frames in ways
    ]
    try:
        videos = decode_each(clip.path, samplings, size, ways[0].decoder)
    except VideoError as error:
        raise RowError(f"video_{error.kind}", error.message) from error
    seconds = time.perf_counter() - began
    return [TimedVideo(video, seconds) for video in videos]


def answer_columns(timed: TimedVideo, answers: Sequence["Answer"]) -> list[dict[str, Any]]:
    """What the output says of each answer, the clip's frames included. Decode time counts for the first row."""
    video = timed.video
    shared = {
        "num_frames": len(video.frames),
        "requested_frames": video.requested_frames,
        "lost_frames": list(video.lost),
        "timestamps": video.timestamps.tolist(),
        "decoder": video.decoder,
    }
    seconds = [timed.seconds] + [0.0] * (len(answers) - 1)
    return [
        shared | {"seconds_decode": decode} | _columns_of(answer)
        for answer, decode in zip(answers, seconds, strict=True)
    ]


def error_columns(error: RowError) -> dict[str, Any]:
    """What the output says of a row without an answer."""
    return {"status": "error", "error_type": error.error_type, "error": error.message}


def _columns_of(answer: "Answer") -> dict[str, Any]:
    if answer.error is not None:
        return error_columns(answer.error)
    columns = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer) if field.name != "error"}
    return columns | {"status": "ok", "visual_tokens_stages": list(answer.visual_tokens_stages.items())}
