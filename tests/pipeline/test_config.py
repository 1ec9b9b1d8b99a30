"""Settings mean the same from the command line, from YAML and from a stored run; wrong ones are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.commandline import from_mapping, parse
from pipeline.config import FrameConfig, JobConfig, PruneConfig, RunConfig, to_mapping
from pipeline.errors import ConfigError

ARGUMENTS = [
    *("--manifest", "m.jsonl", "--output", "out", "--model", "some/model", "--fps", "2", "--max-frames", "16"),
    *("--keep-ratio", "0.1", "--method-options", "key_score=large", "seed=3", "--retry-errors", "--workers", "2"),
]


def test_command_line_fills_the_groups() -> None:
    config = parse(JobConfig, ARGUMENTS)
    assert config.frames == FrameConfig(fps=2.0, max_frames=16)
    assert config.prune == PruneConfig(keep_ratio=0.1, method_options={"key_score": "large", "seed": 3})
    assert config.run == RunConfig(output=Path("out"), retry_errors=True, workers=2)
    assert parse(JobConfig, []) == JobConfig()


def test_stored_settings_give_the_same_config() -> None:
    config = parse(JobConfig, ARGUMENTS)
    assert from_mapping(JobConfig, json.loads(json.dumps(to_mapping(config)))) == config


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_yaml_file_and_flags_over_it(tmp_path: Path, form: list[str]) -> None:
    file = tmp_path / "job.yaml"
    config = parse(JobConfig, ARGUMENTS)
    file.write_text(yaml.safe_dump(to_mapping(config)))
    words = [word.format(file) for word in form]
    assert parse(JobConfig, words) == config
    changed = parse(JobConfig, ["--keep-ratio", "0.5", *words, "--no-retry-errors"])
    assert changed.prune == PruneConfig(keep_ratio=0.5, method_options=config.prune.method_options)
    assert changed.run == RunConfig(output=Path("out"), workers=2)


def test_yaml_numbers_fit_their_fields(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("frames: {fps: 2}\nrun: {output: out, gpus_per_worker: 1}\nprune: {method_options: {a: x}}\n")
    config = parse(JobConfig, ["--config", str(file)])
    assert isinstance(config.frames.fps, float)
    assert config.run == RunConfig(output=Path("out"), gpus_per_worker=1.0)
    assert config.prune.method_options == {"a": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {keep: 1}", "prune.keep: unknown setting; known here are frame_chunk, keep_ratio, method"),
        ("pruning: {}", "pruning: unknown setting; known here are answer, frames"),
        ("prune: 0.25", "prune: expected a mapping, got 0.25"),
        ("prune: {keep_ratio: '1'}", "prune.keep_ratio is '1'; it must be float"),
        ("prune: {keep_ratio: 2}", r"keep_ratio is 2.0; it must be in \(0, 1\]"),
        ("prune: {method_options: [a]}", "prune.method_options is .*; it must be Mapping"),
        ("frames: {num_frames: true}", "frames.num_frames is True; it must be int or None"),
        ("frames: {decoder: opencv}", "frames.decoder is 'opencv'"),
        ("- a", "expected a mapping"),
        ("a: [", "job.yaml: while parsing"),
    ],
)
def test_wrong_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse(JobConfig, ["--config", str(file)])


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("frames", {"num_frames": 8, "fps": 1.0}, "num_frames is 8; it must be left out when fps is given"),
        ("frames", {"max_frames": 8}, "max_frames is 8; it must be used with fps"),
        ("frames", {"num_frames": 0}, "num_frames is 0"),
        ("frames", {"min_frames": 9}, "min_frames is 9; it must be at most the 8 frames taken"),
        ("frames", {"fps": -1.0}, "fps is -1.0"),
        ("frames", {"fps": float("inf")}, "fps is inf"),
        ("frames", {"decode_timeout": 0.0}, "decode_timeout is 0.0"),
        ("prune", {"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ("prune", {"frame_chunk": 0}, "frame_chunk is 0"),
        ("answer", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("run", {"max_error_rate": 1.5}, "max_error_rate is 1.5"),
        ("run", {"workers": 0}, "workers is 0"),
        ("run", {"shard_size": 0}, "shard_size is 0"),
        ("run", {"decode_ahead": -1}, "decode_ahead is -1"),
        ("input", {"limit": 0}, "limit is 0"),
    ],
)
def test_value_out_of_range_is_named(group: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(JobConfig, {group: values})


@pytest.mark.parametrize("arguments", [["--fpss", "1"], ["--keep-ratio", "2"], ["--keep-ratio", "some"], ["stray"]])
def test_rejected_command_line_exits_with_1(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(JobConfig, arguments)
    assert exit.value.code == 1
    assert arguments[0].strip("-") in capsys.readouterr().err.replace("_", "-")


def test_missing_config_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--config no\.yaml: .*No such file"):
        parse(JobConfig, ["--config", "no.yaml"])
    with pytest.raises(ConfigError, match="--config needs a YAML file"):
        parse(JobConfig, ["--config"])


def test_help_shows_groups_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(JobConfig, ["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for words in ("frames options", "prune options", "--keep-ratio", "(default: 0.25)", "--config FILE.yaml"):
        assert words in text


def test_eight_frames_unless_fps_is_given() -> None:
    assert FrameConfig().uniform_frames == 8
    assert FrameConfig(num_frames=5).uniform_frames == 5
    assert FrameConfig(fps=1.0).uniform_frames is None
