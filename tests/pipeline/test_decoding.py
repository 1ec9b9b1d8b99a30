"""A clip's frames are those that the settings ask for."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import FrameConfig
from pipeline.decoding import TimedVideo, decode_clip, decode_clips
from pipeline.errors import RowError
from pipeline.manifest import Clip, Row
from tests.pipeline.videos import read_number, write_video


def make_clip(path: Path, *, start: float | None = None, end: float | None = None) -> Clip:
    return Clip(str(path), start, end, (Row(index=0, sample_id="a", video=path.name, path=str(path), question="q"),))


def test_frames_are_those_of_the_span(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 50)
    timed = decode_clip(make_clip(path, start=0.4, end=1.2), FrameConfig(num_frames=3), None)
    assert [read_number(frame) for frame in timed.video.frames] == [10, 20, 30]
    assert timed.video.timestamps.tolist() == pytest.approx([0.4, 0.8, 1.2])
    assert timed.seconds > 0
    every = decode_clip(make_clip(path), FrameConfig(fps=5.0, max_frames=4), (48, 80))
    assert every.video.frames.shape == (4, 48, 80, 3)


def test_file_that_cannot_be_used_is_a_row_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"nowhere\.mp4") as failure:
        decode_clip(make_clip(tmp_path / "nowhere.mp4"), FrameConfig(), None)
    assert failure.value.error_type == "video_missing"


def test_clips_of_one_file_are_decoded_together_and_fail_apart(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 50)
    spans = [(0.0, 1.0), (0.4, 1.2), (60.0, 70.0), (0.4, 1.2)]
    clips = [make_clip(path, start=start, end=end) for start, end in spans]
    first, second, outside, same = decode_clips(clips, FrameConfig(num_frames=3), (48, 80))
    for clip, timed in ((clips[0], first), (clips[1], second)):
        assert isinstance(timed, TimedVideo)
        np.testing.assert_array_equal(
            timed.video.frames, decode_clip(clip, FrameConfig(num_frames=3), (48, 80)).video.frames
        )
    assert isinstance(outside, RowError) and outside.error_type == "video_span_outside"
    assert isinstance(same, TimedVideo) and isinstance(second, TimedVideo) and same.video is second.video
    missing = decode_clips([make_clip(tmp_path / "nowhere.mp4")] * 2, FrameConfig(), None)
    assert [error.error_type for error in missing if isinstance(error, RowError)] == ["video_missing"] * 2


def test_settings_reach_the_decoder(tmp_path: Path) -> None:
    clip = make_clip(write_video(tmp_path / "v.mp4", 50, options={"g": "10"}))
    keyframes = decode_clip(clip, FrameConfig(num_frames=4, sampling="keyframes", decode_threads=2), None)
    assert keyframes.video.indices.tolist() == [0, 20, 30, 40]
    with pytest.raises(RowError, match="take fewer frames") as failure:
        decode_clip(clip, FrameConfig(num_frames=8, decode_memory=1e-4), None)
    assert failure.value.error_type == "video_too_many_frames"


def test_second_try_is_pyavs(tmp_path: Path) -> None:
    clip = make_clip(write_video(tmp_path / "v.mp4", 10))
    decoders = [
        decode_clip(clip, FrameConfig(num_frames=2, decoder=decoder), None, again=again).video.decoder
        for decoder, again in (("auto", False), ("auto", True), ("decord", True))
    ]
    assert decoders == ["decord", "pyav", "decord"]
