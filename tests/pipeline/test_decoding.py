"""A clip's frames are those that the settings ask for."""

from pathlib import Path

import pytest

from pipeline.config import FrameConfig
from pipeline.decoding import decode_clip
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
