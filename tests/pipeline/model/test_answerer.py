"""What a worker of the main job makes of answers, and how it ends when its device fails."""

from pathlib import Path

import pytest
import torch

from pipeline.config import FrameConfig
from pipeline.decoding import decode_clip
from pipeline.errors import RowError
from pipeline.manifest import Clip, Row
from pipeline.model.answer import Answer
from pipeline.model.answerer import ClipAnswerer, answer_columns
from pipeline.output import ANSWER_SCHEMA
from tests.pipeline.videos import write_video


def make_clip(path: Path) -> Clip:
    return Clip(str(path), None, None, (Row(index=0, sample_id="a", video=path.name, path=str(path), question="q"),))


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


def test_device_error_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access on a GPU nothing works in that process; Ray replaces it."""
    answerer = ClipAnswerer.__new__(ClipAnswerer)

    class LostDevice:
        def step(self) -> list[Answer]:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(answerer, "session", LostDevice(), raising=False)
    with pytest.raises(SystemExit, match="illegal memory access"):
        answerer.step()
