"""Every command of the README is run as it stands there, one after the other, in a copy of the project."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.manifest import load_manifest
from pipeline.output import ANSWER_SCHEMA
from tests.jobs.runs import read_rows, read_run

UNREACHABLE_STATUS = "unreachable"

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without its outputs, with an environment that counts as installed."""
    copy = tmp_path_factory.mktemp("project") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "output", "*cache*"))
    environment = copy / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith(".stamp"):
            (environment / entry.name).symlink_to(entry)
    for stamp in (".stamp-run", ".stamp-test"):
        (environment / stamp).touch()
    return copy


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head node with token authentication; the environment variables that lead to it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # Ray's sockets need a short path
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard = free_port()
    options = [
        *("--port", free_port(), "--dashboard-port", dashboard, "--ray-client-server-port", free_port()),
        *("--dashboard-agent-listen-port", free_port(), "--num-cpus", 2, "--num-gpus", 0, "--temp-dir", folder),
    ]
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--disable-usage-stats", *map(str, options)],
        env=environment() | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_port(dashboard, head)
        yield {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(60)
        finally:
            os.killpg(head.pid, signal.SIGKILL) if head.poll() is None else None
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "the head node has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail("the head node does not come up")


def environment() -> dict[str, str]:
    """This process's environment with the commands of its Python first, and no cluster."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check_demo(checkout: Path, printed: str) -> None:
    rows, run = read_rows(checkout / "output/demo"), read_run(checkout / "output/demo")
    assert run["rows"] == len(rows) > 200
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert run["summary"]["accuracy"] >= 0.75
    assert run["summary"]["kept_fraction"] == pytest.approx(0.25, abs=0.005)
    assert f"{len(rows)}: {len(rows)} ok, 0 with an error" in printed


def check_tests(checkout: Path, printed: str) -> None:
    assert "tests/test_readme.py: " in printed


def check_own_videos(checkout: Path, printed: str) -> None:
    rows = read_rows(checkout / "output/keep-10").values()
    assert len(rows) == 40
    assert all(row["visual_tokens_kept"] / row["visual_tokens_full"] == pytest.approx(0.1, abs=0.005) for row in rows)


def check_submitted(checkout: Path, printed: str) -> None:
    """The cluster's answers are those of the demo."""
    submitted, demo = read_rows(checkout / "output/submitted"), read_rows(checkout / "output/demo")
    manifest = load_manifest(str(checkout / "output/demo/videos/manifest.jsonl"), limit=40)
    assert sorted(submitted) == sorted(row.sample_id for row in manifest.rows)
    for name, row in submitted.items():
        assert (row["status"], row["prediction"]) == ("ok", demo[name]["prediction"])
        assert row["timestamps"] == demo[name]["timestamps"]
    assert "40/40 rows (100 %)" in printed


def check_sweep(checkout: Path, printed: str) -> None:
    cells = {row["cell"]: row for row in pq.read_table(checkout / "output/sweep-small/cells.parquet").to_pylist()}
    assert {name for name, row in cells.items() if not row["reachable"]} == {"fastv-0.1"}
    assert all(row["n"] == 20 and row["seconds_total"] > 0 for row in cells.values() if row["reachable"])
    assert cells["vitcop-0.1"]["retention_mean"] == pytest.approx(0.1, abs=0.005)
    assert (checkout / "output/sweep-small/report.html").is_file()


def check_frames(checkout: Path, printed: str) -> None:
    assert json.loads(printed)["frames"] == 32
    with Image.open(checkout / "output/frames.png") as sheet:
        assert sheet.width > 300


CHECKS: dict[str, Callable[[Path, str], None] | None] = {
    "make demo": check_demo,
    "make test": check_tests,
    "source .venv/bin/activate": None,
    "python jobs/videoqa.py --manifest": check_own_videos,
    "RAY_AUTH_MODE=token ray job submit": check_submitted,
    "python jobs/sweep.py --manifest": check_sweep,
    "python -m pipeline.video": check_frames,
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, checkout: Path, request: pytest.FixtureRequest) -> None:
    (start,) = [start for start in CHECKS if command.startswith(start)]
    variables = environment() | {"PYTEST_ADDOPTS": "--collect-only -qq"}  # or `make test` would come back here
    if "ray job" in command:
        variables |= request.getfixturevalue("ray_head")
    result = subprocess.run(
        ["bash", "-c", command], cwd=checkout, env=variables, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    check = CHECKS[start]
    if check is not None:
        check(checkout, result.stdout)


def test_every_check_has_its_command() -> None:
    assert all(any(command.startswith(start) for command in COMMANDS) for start in CHECKS)


def test_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines on `vitcop`, with the embedded model and a black clip."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from pipeline.embedded import MODEL_DIR

    (example,) = [text for language, text in BLOCKS if language == "python"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    prompt = f"<|im_start|> user {'<video> ' * 289} what color is the moving object ? <|im_end|> <|im_start|> assistant"
    frames = torch.full((1, 8, 3, 96, 96), -1.0)
    inputs = dict(tokenizer(prompt, return_tensors="pt")) | {"pixel_values_videos": frames}
    names = {"model": AutoModelForImageTextToText.from_pretrained(MODEL_DIR), "inputs": inputs}
    exec(example, names)
    printed = capsys.readouterr().out
    assert float(printed.split()[-1]) == pytest.approx(0.25, abs=0.005)


def test_every_column_and_error_is_listed() -> None:
    for name in ANSWER_SCHEMA.names:
        assert f"`{name}`" in README, name
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pipeline").rglob("*.py"))
    rows = re.findall(r'RowError\(\s*"(\w+)"', sources)
    videos = [f"video_{kind}" for kind in re.findall(r'VideoError\(\s*"(\w+)"', sources)]
    assert rows
    assert videos
    for name in {*rows, *videos, UNREACHABLE_STATUS}:
        assert f"`{name}`" in README, name


def paths_of_the_tree() -> list[str]:
    """The files and folders of the README's tree, by their paths."""
    (tree,) = [text for language, text in BLOCKS if not language]
    paths, parents = [], [""]
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[: depth + 1], parents[depth] + name]
        paths.append(parents[-1])
    return paths


def test_each_module_stands_in_the_tree_once() -> None:
    paths = paths_of_the_tree()
    assert len(paths) == len(set(paths))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    # A folder without files of its own in the tree stands for all that it holds.
    whole = [path for path in paths if path.endswith("/") and not any(p.startswith(path) and p != path for p in paths)]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline").rglob("*.py")}
    named = {path for path in modules if not path.endswith("__.py") and not any(path.startswith(w) for w in whole)}
    assert named == {path for path in paths if path.endswith(".py")}
