"""The calibration command: the profile it writes, and what it says when something is wrong."""

from pathlib import Path

import numpy as np
import pytest

from jobs.calibrate import main
from pipeline.config import AnswerConfig, PruneConfig
from pipeline.embedded.demo import write_video
from pipeline.embedded.scenes import sample_scene
from pipeline.model.answering import VideoQA, build_method
from pipeline.model.load import load_model
from pipeline.model.prompt import Question
from pipeline.video import decode
from pipeline.video.sampling import Sampling
from tests.pipeline.model.tiny_models import save_checkpoint
from vitcop.calibration import FILE_NAME, Profile


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(4):
        write_video(folder / f"{seed}.mp4", sample_scene(np.random.default_rng(seed)), np.arange(12) / 12, 64)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_the_profile_that_is_written_is_used_by_the_pipeline(
    tmp_path: Path, videos: list[Path], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(family, tmp_path)
    words = ["--model", str(tmp_path), "--num-frames", "2", "--question", "Why?", "Who?", "--device", "cpu"]
    assert main([*words, "--videos", *map(str, videos)]) == 0
    profile = Profile.load(tmp_path / FILE_NAME)
    assert profile.clips == 4
    assert f"shallow stage: {profile.shallow.key_score}" in capsys.readouterr().out
    prune = PruneConfig(keep_ratio=0.5, method_options={"key_score": "profile"})
    qa = VideoQA(load_model(str(tmp_path), device="cpu"), build_method(prune), AnswerConfig())
    (answer,) = qa.answer(decode(videos[0], Sampling(num_frames=2), qa.frame_size), [Question(question="Why?")])
    assert answer.error is None
    assert repr(profile) in qa.record.method


def test_the_command_says_what_is_wrong(tmp_path: Path, videos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint("llava_onevision", tmp_path)
    model, output = ["--model", str(tmp_path), "--device", "cpu"], ["--output", str(tmp_path / "none" / "profile.json")]
    paths = list(map(str, videos))
    (tmp_path / "text.mp4").write_text("no video")
    for words, message in (
        ([*model, "--videos", paths[0]], "4 or more"),
        (["--model", str(tmp_path / "missing"), "--videos", *paths], "missing"),
        ([*model, "--videos", str(tmp_path / "text.mp4"), *paths], "text.mp4"),
        ([*model, "--videos", *paths, "--num-frames", "2", *output], "none/profile.json"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err
