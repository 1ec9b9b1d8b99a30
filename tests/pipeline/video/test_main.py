"""python -m pipeline.video"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.video.__main__ import main
from tests.pipeline.videos import read_number, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 50, options={"g": "20"})


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    return json.loads(captured.out)


def test_npz_and_the_line_of_json(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "frames.npz"
    line = run(capsys, clip, "--num-frames", "4", "--out", out)
    assert line["indices"] == [0, 16, 33, 49]
    assert line["timestamps"] == [0.0, 0.64, 1.32, 1.96]
    facts = {name: line[name] for name in ("codec", "frames", "fps", "duration", "decoder", "size", "lost")}
    assert facts == {
        "codec": "h264",
        "frames": 50,
        "fps": 25.0,
        "duration": 2.0,
        "decoder": "decord",
        "size": [96, 160],
        "lost": [],
    }
    written = np.load(out)
    assert (written["frames"].shape, written["frames"].dtype) == ((4, 96, 160, 3), np.uint8)
    assert [read_number(frame) for frame in written["frames"]] == written["indices"].tolist() == line["indices"]
    np.testing.assert_allclose(written["timestamps"], line["timestamps"], atol=1e-6)


def test_contact_sheet(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    run(capsys, clip, "--num-frames", "6", "--out", out)
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (2 * 110, 3 * 160, 3)
    corners = [(110 * row, 160 * column) for row in range(2) for column in range(3)]
    shown = [sheet[top : top + 96, left : left + 160] for top, left in corners]
    assert [read_number(frame) for frame in shown] == [0, 10, 20, 29, 39, 49]


def test_sampling_options(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run(capsys, clip)["indices"]) == 8
    assert run(capsys, clip, "--fps", "5", "--start", "1")["indices"] == [25, 30, 35, 40, 45]
    assert run(capsys, clip, "--fps", "25", "--max-frames", "3", "--end", "0.4")["indices"] == [0, 5, 10]
    line = run(capsys, clip, "--num-frames", "80", "--size", "48x64", "--decoder", "pyav")
    assert (len(line["indices"]), line["requested_frames"], line["size"], line["decoder"]) == (50, 80, [48, 64], "pyav")
    assert run(capsys, clip, "--size", "32")["size"] == [32, 32]


def test_keyframes_instead_of_uniform_frames(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = run(capsys, clip, "--num-frames", "4", "--sampling", "keyframes")
    assert (line["indices"], line["timestamps"]) == ([0, 20, 40], [0.0, 0.8, 1.6])
    assert (line["sampling"], line["decoder"], line["requested_frames"]) == ("keyframes", "pyav", 4)
    uniform = run(capsys, clip, "--num-frames", "8", "--sampling", "keyframes", "--threads", "2", "--decoder", "pyav")
    assert uniform["sampling"] == "uniform" and uniform["indices"] == run(capsys, clip)["indices"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.mp4"], "missing.mp4: cannot be opened"),
        (["."], ".: is a directory"),
        ([__file__], "not a readable video file"),
        (["CLIP", "--num-frames", "2", "--fps", "2"], "either num_frames or fps"),
        (["CLIP", "--start", "60"], "outside the video, which runs from 0 to 2 s"),
        (["CLIP", "--num-frames", "4", "--min-frames", "5"], "num_frames=4 is below min_frames=5"),
        (["CLIP", "--out", "/nowhere/at/all.npz"], "/nowhere/at/all.npz"),
    ],
)
def test_one_line_on_stderr_and_status_1(
    clip: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(clip) if word == "CLIP" else word for word in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--out", "frames.jpg"], ["--size", "0x3"], ["--size", "3x4x5"], ["--threads", "0"]]
)
def test_arguments_of_the_wrong_form(clip: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(clip), *arguments])
    assert arguments[1] in capsys.readouterr().err


def test_as_a_program(clip: Path, tmp_path: Path) -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.video", *arguments]
        root = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=root, cwd=tmp_path)

    done = start(str(clip), "--num-frames", "8", "--out", "X.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(np.load(tmp_path / "X.npz")["frames"]) == len(json.loads(done.stdout)["indices"]) == 8
    broken = start(str(tmp_path))
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr == f"{tmp_path}: is a directory, not a video file\n"
