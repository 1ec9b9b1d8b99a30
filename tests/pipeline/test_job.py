"""The walk that both jobs share: what is left to do, counts and events, and the exit code."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from pipeline import job
from pipeline.cluster import Build, ClipResult
from pipeline.config import InputConfig, JobConfig, RunConfig
from pipeline.errors import ConfigError, RowError
from pipeline.job import Answered, Job, Run, make_plan, run_job
from pipeline.manifest import Clip, load_manifest
from pipeline.output import ANSWER_SCHEMA, error_columns, open_output
from pipeline.output.events import ClipDone, Event, PartWritten, WorkerLost


class FakeEngine:
    """Answers every clip at once; the video's name says what happens to it."""

    def __init__(self, build: Build, config: object, *, on_worker_lost: Callable[[str, int], None]) -> None:
        self.on_worker_lost = on_worker_lost

    def __class_getitem__(cls, kind: type) -> type["FakeEngine"]:
        return cls

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, clips: list[Clip], tick: Callable[[], None]) -> Iterator[ClipResult[Clip]]:
        for clip in clips:
            tick()
            name = clip.rows[0].video
            if name == "interrupt":
                raise KeyboardInterrupt("SIGTERM")
            if name == "bug":
                raise ZeroDivisionError("in the driver")
            if name == "dies":
                self.on_worker_lost("killed", 2)
            error = RowError("video_missing", name) if name == "bad" else None
            yield ClipResult(clip=clip, attempt=1, answers=None, error=error)


class EchoJob(Job):
    schema: ClassVar[pa.Schema] = ANSWER_SCHEMA
    demo_output: ClassVar[Path] = Path("unused")
    finished = False

    def build(self) -> Build:
        return lambda threads: pytest.fail("no worker is started here")

    def columns(self, result: ClipResult[Clip], attempts: Mapping[str, int]) -> Answered:
        columns = {"status": "ok"} if result.error is None else error_columns(result.error)
        return [(row, columns | {"attempt": 1 + attempts.get(row.sample_id, 0)}) for row in result.clip.rows]

    def finish(self, run: Run) -> None:
        self.finished = True

    def summarize(self, run: Run) -> dict[str, Any]:
        done = run.folder.done().values()
        return {"failed": len(run.manifest.rows) - sum(entry.status == "ok" for entry in done)}

    def report(self, run: Run, state: str, summary: Mapping[str, Any]) -> None:
        self.reported = (state, dict(summary), run.counts)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Engine", FakeEngine)


def make_job(folder: Path, videos: list[str], **run: Any) -> EchoJob:
    manifest = folder / "m.jsonl"
    manifest.write_text("".join(json.dumps({"video": name, "question": "q"}) + "\n" for name in videos))
    config = JobConfig(input=InputConfig(manifest=str(manifest)), run=RunConfig(output=folder / "out", **run))
    return EchoJob(config)


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "run.json").read_text())


def test_a_finished_run(tmp_path: Path) -> None:
    echo = make_job(tmp_path, ["a", "b", "a"])
    assert run_job(echo) == 0
    assert echo.finished
    state, summary, counts = echo.reported
    assert (state, summary) == ("finished", {"failed": 0})
    assert (counts.videos, counts.rows, counts.errors) == (2, 3, 0)
    assert read_record(tmp_path)["state"] == "finished"
    assert read_record(tmp_path)["this_run"]["rows"] == 3
    assert run_job(make_job(tmp_path, ["a", "b", "a"])) == 0
    assert read_record(tmp_path)["this_run"]["rows"] == 0, "all of it was done"


@pytest.mark.parametrize(("rate", "code"), [(0.4, 2), (0.5, 0)])
def test_errors_decide_the_exit_code(tmp_path: Path, rate: float, code: int) -> None:
    assert run_job(make_job(tmp_path, ["a", "bad"], max_error_rate=rate)) == code


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(tmp_path: Path) -> None:
    echo = make_job(tmp_path, ["a", "interrupt", "b"])
    assert run_job(echo) == job.INTERRUPTED
    assert not echo.finished
    assert read_record(tmp_path)["state"] == "interrupted"
    with open_output(tmp_path / "out") as folder:
        manifest = load_manifest(str(tmp_path / "m.jsonl"))
        plan = make_plan(manifest, folder, shard_size=1, retry_errors=False)
        assert [clip.rows[0].video for clip in plan.clips] == ["interrupt", "b"]
        assert plan.finished == 1
        assert plan.shard_sizes == {0: 1, 1: 1}


def test_a_run_that_breaks_has_failed_and_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_job(make_job(tmp_path, ["a", "bug"]))
    assert read_record(tmp_path)["state"] == "failed"
    assert read_record(tmp_path)["summary"] == {"failed": 1}


def test_rows_with_an_error_are_done_again_when_asked(tmp_path: Path) -> None:
    run_job(make_job(tmp_path, ["a", "bad"]))
    run_job(make_job(tmp_path, ["a", "bad"], retry_errors=True))
    with open_output(tmp_path / "out") as folder:
        assert sorted((entry.status, entry.attempt) for entry in folder.done().values()) == [("error", 2), ("ok", 1)]


def test_another_question_under_the_same_id_is_refused(tmp_path: Path) -> None:
    for question in ("q", "r"):
        (tmp_path / "m.jsonl").write_text(json.dumps({"video": "a", "question": question, "sample_id": "1"}))
        config = JobConfig(
            input=InputConfig(manifest=str(tmp_path / "m.jsonl")), run=RunConfig(output=tmp_path / "out")
        )
        if question == "q":
            assert run_job(EchoJob(config)) == 0
        else:
            with pytest.raises(ConfigError, match="another question under sample_id '1'"):
                run_job(EchoJob(config))


def test_listeners_hear_what_happens(tmp_path: Path) -> None:
    echo = make_job(tmp_path, ["dies", "bad"], shard_size=1)
    heard: list[Event] = []
    with open_output(tmp_path / "out") as folder:
        manifest = load_manifest(str(tmp_path / "m.jsonl"))
        plan = make_plan(manifest, folder, shard_size=1, retry_errors=False)
        Run(echo, folder, manifest, plan, [heard.append]).answer()
    told = [event for event in heard if not isinstance(event, job.Tick)]
    assert told == [
        WorkerLost("killed", 2),
        ClipDone(1, 0),
        PartWritten("part-00000.parquet", 1),
        ClipDone(1, 1),
        PartWritten("part-00001.parquet", 1),
    ]


def test_a_manifest_needs_an_output_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--manifest needs an --output folder"):
        EchoJob(JobConfig(input=InputConfig(manifest="m.jsonl")))
