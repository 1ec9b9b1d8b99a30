"""A clip's frames and answers become the columns of its rows, each written once."""

from pathlib import Path

import pytest
import torch

from pipeline.config import FrameConfig, JobConfig
from pipeline.errors import RowError
from pipeline.manifest import Clip, Row
from pipeline.model.answering import Answer
from pipeline.output import ANSWER_SCHEMA
from pipeline.stages import answer_columns, decode_clip
from pipeline.worker import ClipAnswerer
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


def test_columns_of_answers_and_errors(tmp_path: Path) -> None:
    timed = decode_clip(make_clip(write_video(tmp_path / "v.mp4", 10)), FrameConfig(num_frames=20), None)
    answers = [
        Answer(prediction="red", visual_tokens_stages={"vision": 5}, seconds_vision=0.5),
        Answer(error=RowError("bad_question", "why")),
        Answer(prediction="blue"),
    ]
    first, error, last = answer_columns(timed, answers)
    assert (first["status"], first["prediction"], first["visual_tokens_stages"]) == ("ok", "red", [("vision", 5)])
    assert (error["status"], error["error_type"], error["error"]) == ("error", "bad_question", "why")
    assert "prediction" not in error
    assert [columns["num_frames"] for columns in (first, error, last)] == [10, 10, 10]
    assert first["requested_frames"] == 20
    assert [columns["seconds_decode"] for columns in (first, error, last)] == [timed.seconds, 0.0, 0.0]
    assert set(first) <= set(ANSWER_SCHEMA.names)


def test_device_error_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access on a GPU nothing works in that process; Ray replaces it."""
    answerer = ClipAnswerer.__new__(ClipAnswerer)

    class LostDevice:
        def answer(self, *_: object) -> list[Answer]:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    answerer.config, answerer.model = JobConfig(), LostDevice()
    clip = make_clip(write_video(tmp_path / "v.mp4", 10))
    with pytest.raises(SystemExit, match="illegal memory access"):
        answerer.answer(clip, decode_clip(clip, FrameConfig(num_frames=2), None))
