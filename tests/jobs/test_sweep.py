"""The sweep from manifest to report."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import sweep
from pipeline import job
from pipeline.embedded.demo import write_dataset
from tests.jobs.runs import InProcessEngine, stamps

METHODS_ASKED = ("vitcop", "random", "fastv", "text_only")
OPTIONS = ["--keep-ratios", "0.25", "0.05", "--seeds", "2", "--cost-clips", "1", "--cost-rounds", "1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of two rendered videos with three questions each."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), 2, questions_per_clip=3)


def run(manifest: Path, output: Path, *arguments: str) -> int:
    return sweep.main(["--manifest", str(manifest), "--output", str(output), "--methods", *METHODS_ASKED, *arguments])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_sweep_answers_every_question_in_every_cell_and_reports(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(dataset, tmp_path, *OPTIONS) == 0
    names = {"none", "vitcop-0.25", "vitcop-0.05", "fastv-0.25", "fastv-0.05", "text_only"}
    names |= {f"random-{ratio}-s{seed}" for ratio in (0.25, 0.05) for seed in (0, 1)}
    rows = [row for part in (tmp_path / "answers").glob("part-*.parquet") for row in pq.read_table(part).to_pylist()]
    assert Counter(row["cell"] for row in rows) == dict.fromkeys(names, 6)
    assert len({(row["sample_id"], row["cell"]) for row in rows}) == len(rows)

    cells = {row["cell"]: row for row in pq.read_table(tmp_path / "cells.parquet").to_pylist()}
    assert set(cells) == names
    assert not cells["fastv-0.05"]["reachable"] and "0.05" in cells["fastv-0.05"]["reason"]
    for name, cell in cells.items():
        if cell["reachable"]:
            assert cell["n"] == 6 and cell["accuracy"] is not None and dict(cell["kind_n"])
            assert cell["seconds_total"] > 0 and cell["flops_total"] > 0 and cell["speedup_allowed"] > 0, name
    vitcop = cells["vitcop-0.25"]
    assert 2 <= vitcop["cost_runs"] == vitcop["cost_rounds"] <= 3, "on one clip; the gallery has two clips"
    assert vitcop["seconds_total_low"] <= vitcop["seconds_total"] <= vitcop["seconds_total_high"]
    assert cells["vitcop-0.25"]["retention_mean"] == pytest.approx(0.25, abs=0.005)
    assert cells["none"]["retention_mean"] == 1 and cells["text_only"]["retention_mean"] == 0
    assert (
        cells["vitcop-0.05"]["macs_language"] < cells["vitcop-0.25"]["macs_language"] < cells["none"]["macs_language"]
    )
    assert cells["random-0.25-s0"]["baseline"] and not cells["vitcop-0.25"]["baseline"]

    clip, *_ = json.loads((tmp_path / "gallery.json").read_text())
    with np.load(tmp_path / clip["file"]) as arrays:
        assert len(arrays["frames"]) == clip["token_frames"] == 8
        shown = {entry["cell"]: entry for entry in clip["cells"]}
        assert len(arrays[shown["vitcop-0.05"]["stages"]["deep"]]) < len(
            arrays[shown["vitcop-0.05"]["stages"]["vision"]]
        )
    assert (tmp_path / "report.html").stat().st_size > 10_000 and (tmp_path / "report.md").exists()
    assert "vitcop-0.25" in capsys.readouterr().out

    monkeypatch.setattr(job, "Engine", InProcessEngine)
    before = stamps(tmp_path / "answers")
    assert run(dataset, tmp_path, *OPTIONS) == 0
    assert stamps(tmp_path / "answers") == before, "a finished sweep answers nothing again"
    assert run(dataset, tmp_path, "--keep-ratios", "0.5") == 1
    assert "sweep.keep_ratios" in capsys.readouterr().err
