"""Each benchmark runs on its smallest setting and prints what it should; what they measure with is right."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import common, manifest, throughput
from benchmarks.common import alternate, medians, publish
from benchmarks.memory import Setting, bytes_per_frame, measure, most_frames, prefill
from benchmarks.shapes import SHAPES, build_model
from benchmarks.tracking import follow, peak_memory
from tests.vitcop.models import build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Benchmarks set the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., dict[str, Any]]:
    """Run a benchmark's command line; returns the JSON it prints."""

    def run_benchmark(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [name, "--threads", "1", *arguments])
        importlib.import_module(f"benchmarks.{name}").main()
        return json.loads(capsys.readouterr().out)

    return run_benchmark


def test_selection_compares_equal_work(run) -> None:
    sizes = ["--frames", "3", "--grid", "6", "--vision-dim", "16", "--dim", "8"]
    result = run("selection", *sizes, "--keep-ratios", "0.3", "--repeats", "1")
    (compared,) = result["results"]
    assert set(compared["ratio"]) == {"plain, pairs", "plain, frames"}
    assert all(value > 0 for value in compared["seconds"].values())
    assert result["machine"]["threads"] == 1 and result["shape"]["frames"] == 3


@pytest.mark.parametrize("method", ["vitcop", "vitcop_video"])
def test_prefill_reports_gains_beside_what_is_allowed(run, method: str) -> None:
    result = run(
        "prefill", "--method", method, "--frames", "4", "--keep-ratios", "0.5", "0.1", "--repeats", "1", "--tokens", "1"
    )
    assert result["shape"]["tokens"] == 4 * 36 and result["settings"]["method"] == method
    half, tenth = result["pruned"]
    for name in ("prefill", "to the first token"):
        assert 1 < half["gain"][name]["allowed"] < tenth["gain"][name]["allowed"]
        assert half["gain"][name]["measured"] > 0
    assert tenth["kv_bytes"] < half["kv_bytes"] < result["full"]["kv_bytes"]
    assert {"vision", "selection", "prefill", "decode per token"} <= set(half["seconds"])
    assert all(seconds >= 0 for seconds in half["seconds"].values())


def test_memory_finds_the_frames_that_fit(run) -> None:
    result = run("memory", "--frames", "4", "8", "--cap", "12", "--keep-ratios", "0.1")
    full, pruned = result["results"]
    assert full["most_frames"] == 8 and full["budget"] == full["peaks"]["8"]
    assert pruned["budget"] == full["budget"] and pruned["peaks"][str(pruned["most_frames"])] <= full["budget"]
    assert pruned["bytes_per_frame"]["measured"] < full["bytes_per_frame"]["measured"]
    assert sum(full["holders"].values()) <= full["peaks"]["8"]


def test_decode_counts_frames_and_states_each_goal(run) -> None:
    sizes = ["--codecs", "h264", "--heights", "144", "--groups", "short", "--copies", "2", "--num-frames", "8"]
    result = run("decode", *sizes, "--repeats", "1")
    (file,) = result["results"]
    readers = file["readers"]
    assert readers["PyAV in order"] == readers["PyAV in order"] | {"frames": 480, "ratio": 1.0}
    assert 8 <= readers["pyav, 8 frames"]["frames"] < 480 * 0.4
    assert readers["keyframes, 8 frames"]["frames"] == 8
    assert {"auto, 8 frames", "decord.get_batch, 8 frames"} <= set(readers)
    assert all(each["seconds"] > 0 for each in readers.values())
    assert [goal["goal"] for goal in result["goals"]] == [0.65, 0.88, 0.05]
    assert all(goal["reached"] == goal["worst"] > 0 for goal in result["goals"])


@pytest.mark.filterwarnings("ignore:the unpruned prompt")
def test_the_formula_meets_the_measured_bytes_of_a_frame() -> None:
    model = build_model("embedded", CPU, torch.float32)
    full = Setting(keep_ratio=1.0, frame_chunk=4, token_chunk=1024)
    measured = (measure(model, 24, full).bytes - measure(model, 16, full).bytes) / 8
    assert measured == pytest.approx(bytes_per_frame(model, None, 24), rel=0.1)
    pruned = Setting(keep_ratio=0.1, frame_chunk=4, token_chunk=1024)
    measured = (measure(model, 160, pruned).bytes - measure(model, 128, pruned).bytes) / 32
    assert measured == pytest.approx(bytes_per_frame(model, prefill(model, 160, pruned), 160), rel=0.1)


# -- what they measure with --------------------------------------------------------------------------------------------


def test_the_peak_is_the_most_held_at_one_time() -> None:
    history = [(0, 10, 1, "a"), (1, 30, 2, "b"), (2, -10, 1, ""), (3, 15, 1, "a"), (4, 5, 3, "a"), (5, -30, 2, "")]
    peak = follow(history)
    assert peak.bytes == 50 and peak.holders == (("b", 30), ("a", 20))


def test_allocations_are_counted_and_named() -> None:
    class Widen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)])

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                tokens = layer(tokens)
            return tokens

    model, tokens = Widen(), torch.randn(100, 64)
    with torch.inference_mode():
        peak = peak_memory(lambda: model(tokens), model, CPU)
    assert peak.bytes == 100 * (256 + 64) * 4
    assert peak.holders == (("layers.* linear", peak.bytes),)
    assert not nn.modules.module._global_forward_pre_hooks


def test_the_most_frames_that_fit_are_found_in_few_measurements() -> None:
    asked: list[int] = []

    def peak_of(frames: int) -> int:
        asked.append(frames)
        return 1000 + 70 * frames + frames**2 // 20

    measured = {16: peak_of(16), 32: peak_of(32)}
    assert most_frames(peak_of, 20_000, dict(measured), 70, cap=40) == 40
    assert most_frames(peak_of, 100, dict(measured), 70, cap=40) == 0
    asked.clear()
    found = most_frames(peak_of, 20_000, measured, 70, cap=4096)
    assert peak_of(found) <= 20_000 < peak_of(round(found * 1.04))
    assert len(asked) < 8


def test_variants_take_turns() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name) or len(order)) for name in "ab"}
    assert alternate(runs, repeats=2) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(order) == "ababab"


def test_medians_are_by_phase() -> None:
    assert medians([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0, "b": 1.0}]) == {"a": 2.0, "b": 1.0}


def test_throughput_answers_everything_in_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    throughput.main(["--shape", "embedded", "--frames", "2", "--tokens", "2", "--plain-batch", "4", "--threads", "1"])
    lines = capsys.readouterr().out
    result = json.loads(lines[lines.index("{") :])
    assert [set(goal) for goal in result["goals"]] == [{"name", "reached", "goal"}] * 4
    assert set(result["seconds"]["8 captions"]) == {"plain", "plain batch", "single", "session"}
    assert all(seconds > 0 for variants in result["seconds"].values() for seconds in variants.values())


def test_manifest_says_what_reading_took(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("jsonl", "parquet"):
        manifest.main(rows=400, kind=kind)
        assert f"{kind}: 400 rows, 100 clips" in capsys.readouterr().out


def test_results_are_named_after_the_machine(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    publish("x", {"machine": {"processor": "A (R) 9", "threads": 2}}, save=True)
    publish("x", {"machine": {"gpu": "NVIDIA H1", "processor": "A", "threads": 2}}, save=True)
    publish("y", {"machine": {"processor": "A", "threads": 2}}, save=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-a-r-9-2-threads.json", "x-nvidia-h1.json"]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_inputs_fit_both_kinds_of_models(family: str) -> None:
    record = prefill(build(family), 4, Setting(keep_ratio=0.3, frame_chunk=2, token_chunk=16))
    assert record is not None and 0.2 < record.retention < 0.4


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_known_to_transformers(shape: str) -> None:
    config = SHAPES[shape]()
    assert config.text_config.num_hidden_layers >= 4 and config.video_token_id is not None
