"""The calibration command: the profile it writes, and what it says when something is wrong."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jobs.calibrate import main
from pipeline.config import AnswerConfig, PruneConfig
from pipeline.embedded.demo import write_video
from pipeline.embedded.scenes import sample_scene
from pipeline.errors import ConfigError
from pipeline.model.answering import VideoQA, build_method
from pipeline.model.load import load_model
from pipeline.model.prompt import Question
from pipeline.video import decode
from pipeline.video.sampling import Sampling
from tests.pipeline.model.tiny_models import save_checkpoint
from tests.vitcop.calibration.profiles import profile_of
from vitcop import get_method
from vitcop.calibration import FILE_NAME, MethodChoice, Preset, Profile
from vitcop.methods import ViTCoPVideo


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
    assert main([*words, "--keep-ratio", "0.3", "--videos", *map(str, videos)]) == 0
    profile = Profile.load(tmp_path / FILE_NAME)
    assert profile.clips == 4
    assert f"shallow stage: {profile.shallow.key_score}" in capsys.readouterr().out
    assert profile.choice is not None and profile.choice.retention_ratio == 0.3
    chosen = get_method(profile.choice.preset.method).__name__ + "(retention_ratio=0.5, "
    loaded = load_model(str(tmp_path), device="cpu")
    for prune, used in (
        (PruneConfig(keep_ratio=0.5, method_options={"key_score": "profile"}), repr(profile)),
        (PruneConfig(keep_ratio=0.5, method="calibrated"), chosen),
    ):
        qa = VideoQA(loaded, build_method(prune, loaded), AnswerConfig())
        (answer,) = qa.answer(decode(videos[0], Sampling(num_frames=2), qa.frame_size), [Question(question="Why?")])
        assert answer.error is None
        assert used in qa.record.method


def test_a_method_is_recommended_by_a_profile_or_refused(tmp_path: Path) -> None:
    save_checkpoint("llava_onevision", tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    config = PruneConfig(method="calibrated", method_options={"motion": 0.4})
    with pytest.raises(ConfigError, match=r"--method calibrated needs a profile, and there is no .*jobs/calibrate\.py"):
        build_method(config, loaded)
    profile_of().save(tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="recommends no method; make it again"):
        build_method(config, loaded)
    preset = Preset(method="vitcop_video", options={"bias": 0.5, "motion": 0.2})
    choice = MethodChoice(preset=preset, retention_ratio=0.1, sure=1.0, divergences={})
    dataclasses.replace(profile_of(), choice=choice).save(tmp_path / FILE_NAME)
    assert build_method(config, loaded) == ViTCoPVideo(retention_ratio=0.25, bias=0.5, motion=0.4)


def test_the_embedded_model_recommends_the_variant_for_video() -> None:
    assert isinstance(build_method(PruneConfig(method="calibrated"), load_model(device="cpu")), ViTCoPVideo)


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
