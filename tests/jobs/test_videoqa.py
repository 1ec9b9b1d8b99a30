"""The main job from manifest to Parquet, with the embedded model: every question once, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import videoqa
from pipeline import job
from pipeline.cluster import ClipResult, Engine
from pipeline.cluster.engine import ClipT
from pipeline.embedded.demo import write_dataset
from pipeline.job import Run
from pipeline.manifest import load_manifest
from pipeline.videoqa import VideoQAJob
from tests.jobs.runs import ROOT, InProcessEngine, read_rows, read_run, stamps, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHARED_VIDEOS = ROOT / "../shared/videos"
NUMBERED_VIDEOS = ROOT / "tests" / "data" / "videos"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of five rendered videos with five questions each."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), 5, questions_per_clip=5)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Engine", InProcessEngine)


def run(manifest: Path, output: Path, *arguments: str) -> int:
    return videoqa.main(["--manifest", str(manifest), "--output", str(output), *arguments])


@pytest.mark.usefixtures("local_ray")
class TestInOneRay:
    def test_each_question_has_a_row_that_says_how_it_was_answered(self, dataset: Path, tmp_path: Path) -> None:
        assert run(dataset, tmp_path / "out", "--shard-size", "10") == 0
        rows, manifest = read_rows(tmp_path / "out"), load_manifest(str(dataset))
        assert sorted(rows) == sorted(row.sample_id for row in manifest.rows)
        for question in manifest.rows:
            row = rows[question.sample_id]
            assert (row["question"], row["video"], row["answer"]) == (
                question.question,
                question.video,
                question.answer,
            )
            assert (row["status"], row["error"], row["attempt"]) == ("ok", None, 1)
            assert row["prediction"] == row["options"][row["choice"]]
            assert row["correct"] == (row["prediction"] == row["answer"])
            assert (row["method"], row["keep_ratio"], row["model"]) == ("vitcop", 0.25, "embedded")
            assert (row["num_frames"], row["requested_frames"], row["lost_frames"]) == (8, 8, [])
            assert row["timestamps"] == pytest.approx([0, 0.5, 1.125, 1.625, 2.25, 2.75, 3.375, 3.875])
            assert row["visual_tokens_kept"] / row["visual_tokens_full"] == pytest.approx(0.25, abs=0.005)
            assert dict(row["visual_tokens_stages"])["vision"] < row["visual_tokens_full"]
            assert row["prompt_tokens"] > 0
            assert row["peak_memory_bytes"] > 0
        assert all(row["seconds_decode"] >= 0 and row["seconds_generate"] > 0 for row in rows.values())
        record = read_run(tmp_path / "out")
        assert (record["state"], record["rows"], record["summary"]["ok"]) == ("finished", len(rows), len(rows))
        assert record["summary"]["accuracy"] == sum(row["correct"] for row in rows.values()) / len(rows)
        assert record["fingerprint"]["prune"]["keep_ratio"] == 0.25
        assert record["versions"]["torch"]

    def test_bad_files_are_named_and_can_be_done_again(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "videos"
        folder.mkdir()
        (folder / "directory.mp4").mkdir()
        os.mkfifo(folder / "fifo.mp4")
        (folder / "empty.mp4").touch()
        (folder / "text.mp4").write_text("no video")
        (folder / "good.mp4").symlink_to(dataset.parent / "clip-0000.mp4")
        bad, good = ["missing", "directory", "fifo", "empty", "text"], ["good"]
        for path in (NUMBERED_VIDEOS / name for name in ("hevc.mp4", "open.ts", "irregular.mp4", "edit_list.mp4")):
            (folder / f"{path.stem}.mp4").symlink_to(path)  # what a file is does not stand in its name
            good.append(path.stem)
        names = bad + good
        question = {"question": "which way does the moving object go ?", "options": ["left", "right"], "answer": "left"}
        manifest = write_manifest(
            folder / "m.jsonl", [question | {"sample_id": name, "video": f"{name}.mp4"} for name in names]
        )
        output = tmp_path / "out"
        assert run(manifest, output, "--decode-timeout", "20") == 2
        rows = read_rows(output)
        assert {name: row["error_type"] for name, row in rows.items()} == {
            "missing": "video_missing",
            "directory": "video_not_a_file",
            "fifo": "video_not_a_file",
            "empty": "video_empty",
            "text": "video_unreadable",
        } | dict.fromkeys(good)
        assert all(f"{name}.mp4" in rows[name]["error"] for name in bad)
        assert all(rows[name]["lost_frames"] == [] for name in good)
        assert read_run(output)["summary"]["errors"]["video_not_a_file"] == 2
        monkeypatch.setattr(job, "Engine", InProcessEngine)
        assert run(manifest, output, "--max-error-rate", "0.9") == 0

        (folder / "missing.mp4").symlink_to(dataset.parent / "clip-0001.mp4")
        assert run(manifest, output) == 2
        assert read_rows(output)["missing"]["status"] == "error"
        assert run(manifest, output, "--retry-errors") == 2
        again = read_rows(output)
        assert sorted(again) == sorted(names)
        assert (again["missing"]["status"], again["missing"]["attempt"]) == ("ok", 2)
        assert (again["empty"]["status"], again["empty"]["attempt"]) == ("error", 2)
        assert all(again[name] == rows[name] for name in good)

    def test_killed_worker_costs_no_row(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        class KillingEngine(Engine[ClipT]):
            """Kills the first worker once it has answered a clip."""

            def run(self, *arguments: Any) -> Iterator[ClipResult[ClipT]]:
                for number, result in enumerate(super().run(*arguments)):
                    if number == 0:
                        import ray

                        ray.kill(self._handles[0].actor)
                    yield result

        monkeypatch.setattr(job, "Engine", KillingEngine)
        assert run(dataset, tmp_path / "out") == 0
        rows = read_rows(tmp_path / "out")
        assert len(rows) == len(load_manifest(str(dataset)).rows)
        assert {row["attempt"] for row in rows.values()} == {1, 2}
        assert "a worker died" in caplog.text

    @pytest.mark.skipif(not SHARED_VIDEOS.is_dir(), reason="the folder of test videos is not there")
    def test_every_real_video_has_a_result(self, tmp_path: Path) -> None:
        files = sorted(
            path for path in SHARED_VIDEOS.resolve().rglob("*") if path.suffix in (".mp4", ".mkv", ".webm", ".ts")
        )
        rows = [
            {"sample_id": file.name, "video": str(file), "question": "what color is the moving object ?"}
            for file in files
        ]
        run(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", "--max-new-tokens", "4")
        results = read_rows(tmp_path / "out")
        assert sorted(results) == sorted(file.name for file in files)
        failed = {name: row["error_type"] for name, row in results.items() if row["status"] == "error"}
        assert failed == {
            "audio_only.mp4": "video_no_video_stream",
            "trunc_nomoov.mp4": "video_unreadable",
            "zero.mp4": "video_empty",
        }


@pytest.mark.usefixtures("in_process")
class TestWithoutRay:
    """What a job does with its rows and its folder; the engine that runs clips is a loop in this process."""

    def test_a_finished_folder_is_left_as_it_is(self, dataset: Path, tmp_path: Path, capsys: Any) -> None:
        assert run(dataset, tmp_path / "out", "--limit", "5") == 0
        before = stamps(tmp_path / "out")
        assert run(dataset, tmp_path / "out", "--limit", "5") == 0
        assert stamps(tmp_path / "out") == before
        assert run(dataset, tmp_path / "out", "--limit", "5", "--keep-ratio", "0.5") == 1
        assert "prune.keep_ratio is 0.25 there and 0.5 here" in capsys.readouterr().err
        assert stamps(tmp_path / "out") == before
        assert run(dataset, tmp_path / "out", "--limit", "8") == 0
        assert stamps(tmp_path / "out").items() > before.items()
        assert len(read_rows(tmp_path / "out")) == 8
        assert run(dataset, tmp_path / "out", "--limit", "3", "--keep-ratio", "0.5", "--overwrite") == 0
        assert [row["keep_ratio"] for row in read_rows(tmp_path / "out").values()] == [0.5] * 3

    def test_labelled_options_are_answered_as_plain_ones(self, dataset: Path, tmp_path: Path, capsys: Any) -> None:
        plain = [json.loads(line) for line in dataset.read_text().splitlines()][:24]
        labelled = [
            row
            | {
                "sample_id": f"labelled-{row['sample_id']}",
                "options": [f"{'ABCD'[number]}. {option}" for number, option in enumerate(row["options"])],
                "answer": "ABCD"[row["options"].index(row["answer"])],
            }
            for row in plain
        ]
        manifest = write_manifest(dataset.parent / "labelled.jsonl", [*plain, *labelled])
        assert run(manifest, tmp_path / "out", "--method", "none") == 0
        rows = read_rows(tmp_path / "out")
        for row in plain:
            first, second = rows[row["sample_id"]], rows[f"labelled-{row['sample_id']}"]
            names = ("options", "prediction", "choice", "correct", "answer_index", "prompt_tokens")
            assert [first[name] for name in names] == [second[name] for name in names]
            assert (first["options_labelled"], second["options_labelled"]) == (False, True)
        right = sum(row["correct"] for row in rows.values())
        assert right >= 44, "the embedded model, unpruned, is nearly always right"
        printed = capsys.readouterr()
        assert '24 of 48 rows have options with labels such as "A. "' in printed.err
        assert "choices   likelihood: options not shown" in printed.out
        assert read_run(tmp_path / "out")["summary"]["choice_scoring"] == "likelihood"
        assert read_run(tmp_path / "out")["config"]["answer"]["choice_scoring"] == "likelihood"

    def test_bad_rows_cost_no_other_row(self, dataset: Path, tmp_path: Path, capsys: Any) -> None:
        good = [json.loads(line) for line in dataset.read_text().splitlines()][:6]
        bad = {
            "empty": {"question": ""},
            "repeated": {"options": ["red", "red"], "answer": "red"},
            "none": {"answer": "no option at all"},
            "ambiguous": {"options": ["1", "2", "3"], "answer": 1},
            "backwards": {"start": 2, "end": 1},
        }
        rows = [*good, *(good[0] | change | {"sample_id": name} for name, change in bad.items())]
        manifest, output = write_manifest(dataset.parent / "bad.jsonl", rows), tmp_path / "out"
        assert run(manifest, output, "--bad-rows", "refuse") == 1
        assert "bad.jsonl, row 7: question is ''" in capsys.readouterr().err
        assert not list(output.glob("part-*"))

        assert run(manifest, output) == 2
        printed = capsys.readouterr()
        assert "5 of 11 rows can't be asked and become rows with an error" in printed.err
        results = read_rows(output)
        assert len(results) == 11
        assert all(results[row["sample_id"]]["status"] == "ok" for row in good)
        types = {name: (results[name]["status"], results[name]["error_type"]) for name in bad}
        assert types == {
            "empty": ("error", "bad_row"),
            "repeated": ("error", "bad_row"),
            "none": ("error", "bad_answer"),
            "ambiguous": ("error", "bad_answer"),
            "backwards": ("error", "bad_row"),
        }
        assert "answer 1 can be the option '1' or the index of '2'" in results["ambiguous"]["error"]
        summary = read_run(output)["summary"]
        right = sum(results[row["sample_id"]]["correct"] for row in good)
        assert (summary["scored"], summary["scored_errors"], summary["accuracy"]) == (11, 5, right / 11)
        assert "5 of them have an error and count as wrong" in printed.out

        before = read_rows(output)
        rows[6]["question"] = good[0]["question"]
        write_manifest(manifest, rows)
        assert run(manifest, output) == 2
        after = read_rows(output)
        assert (after["empty"]["status"], after["empty"]["attempt"]) == ("ok", 2), "corrected in the manifest"
        assert {name: row for name, row in after.items() if name != "empty"} == {
            name: row for name, row in before.items() if name != "empty"
        }

    def test_a_manifest_of_bad_rows_is_all_errors(self, tmp_path: Path) -> None:
        manifest = write_manifest(
            tmp_path / "m.jsonl", [{"video": "a", "question": ""}, {"video": "", "question": "q"}]
        )
        assert run(manifest, tmp_path / "out", "--shard-size", "1") == 2
        assert [row["error_type"] for row in read_rows(tmp_path / "out").values()] == ["bad_row"] * 2

    def test_prompts_use_columns_and_count_by_content(self, dataset: Path, tmp_path: Path, capsys: Any) -> None:
        template, output = tmp_path / "prompt.txt", tmp_path / "out"
        template.write_text("{{ kind }} {{ question }}")
        assert run(dataset, output, "--limit", "5", "--prompt", f"@{template}") == 0
        assert read_run(output)["config"]["answer"]["prompt"] == "{{ kind }} {{ question }}"
        assert run(dataset, tmp_path / "plain", "--limit", "5") == 0
        longer, plain = read_rows(output), read_rows(tmp_path / "plain")
        assert all(longer[name]["prompt_tokens"] > plain[name]["prompt_tokens"] for name in plain)
        template.write_text("{{ question }} {{ kind }}")
        capsys.readouterr()
        assert run(dataset, output, "--limit", "5", "--prompt", f"@{template}") == 1
        assert "answer.prompt is '{{ kind }} {{ question }}' there" in capsys.readouterr().err
        assert run(dataset, output, "--limit", "5", "--prompt", "{{ kind }} {{ question }}") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--manifest", "missing.jsonl", "--output", "out"], "missing.jsonl: no manifest there"),
        (["--manifest", "m.jsonl"], "--manifest needs an --output folder"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--method", "magic"], "--method magic: "),
        (["--prompt", "{category}: {{ question }}"], "--prompt holds {category}; a column is written {{ category }}"),
        (
            ["--prompt", "{{ category }}: {{ question }}"],
            "--prompt uses 'category', but there is no such column; known are sample_id, video, question, options, "
            "answer, answer_index, start, end, kind",
        ),
        (["--system", "{{ category }}"], "--system uses 'category', but there is no such column"),
        (["--system", "@missing.txt"], "--system @missing.txt: "),
        (["--method-options", "magic=1"], "--method vitcop: "),
        (["--config", "missing.yaml"], "--config missing.yaml: "),
    ],
)
def test_wrong_settings_end_with_1_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VideoQAJob, "demo_clips", 1)
    monkeypatch.setattr(Run, "answer", lambda _: pytest.fail("the job has begun"))
    write_manifest(tmp_path / "m.jsonl", [{"video": "a", "question": "q"}])
    assert videoqa.main(arguments) == 1
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("in_process")
def test_interrupted_job_goes_on_where_it_was(
    number: signal.Signals, dataset: Path, tmp_path: Path, local_ray: str
) -> None:
    """The driver is stopped in a process of its own after the first part; this process does the rest.

    The one that may end its Ray has its own, the one that is killed uses the cluster of the tests.
    """
    output = tmp_path / "out"
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if number == signal.SIGKILL:
        variables["RAY_ADDRESS"] = local_ray
    arguments = ["--manifest", str(dataset), "--output", str(output), "--shard-size", "5"]
    driver = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "videoqa.py", *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )
    watchdog = threading.Timer(150, driver.kill)
    watchdog.start()
    while driver.poll() is None and not list(output.glob("part-*")):
        time.sleep(0.02)
    driver.send_signal(number)
    _, messages = driver.communicate()
    watchdog.cancel()
    done = stamps(output)
    finished = len(read_rows(output))
    total = len(load_manifest(str(dataset)).rows)
    assert 0 < finished < total
    if number == signal.SIGKILL:
        assert read_run(output)["state"] == "running"
    else:
        assert driver.returncode == job.INTERRUPTED, messages
        assert (read_run(output)["state"], read_run(output)["summary"]["rows"]) == ("interrupted", finished)
        assert f"interrupted ({number.name})" in messages
    assert run(dataset, output, "--shard-size", "5") == 0
    assert stamps(output).items() > done.items()
    assert len(read_rows(output)) == total
    assert read_run(output)["state"] == "finished"
