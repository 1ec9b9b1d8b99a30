"""Results may stand beside each other when everything that an answer depends on is the same, and only then."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.commandline import from_mapping
from pipeline.config import JobConfig
from pipeline.output import OutputFolder
from pipeline.output.events import ClipDone, Tick
from pipeline.output.record import HEARTBEAT_SECONDS, MISSED_BEATS, RunRecord, fingerprint, run_state, versions

NO_COLUMNS = pa.schema({})


def make(settings: dict[str, Any], revision: str = "r1", columns: pa.Schema = NO_COLUMNS) -> dict[str, Any]:
    return fingerprint(from_mapping(JobConfig, settings), revision, columns)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"dtype": "bfloat16"}},
        {"frames": {"num_frames": 16}},
        {"frames": {"fps": 2.0}},
        {"frames": {"decoder": "pyav"}},
        {"frames": {"sampling": "keyframes"}},
        {"prune": {"keep_ratio": 0.5}},
        {"prune": {"method_options": {"key_score": "large"}}},
        {"answer": {"prompt": "Say: {{ question }}"}},
        {"answer": {"max_new_tokens": 8}},
    ],
)
def test_what_changes_answers_changes_the_fingerprint(settings: dict[str, Any]) -> None:
    assert make(settings) != make({})


@pytest.mark.parametrize(
    "settings",
    [
        {"frames": {"num_frames": 8}},
        {"frames": {"decode_timeout": 5.0, "decode_threads": 4, "decode_memory": 2.0}},
        {"model": {"device": "cpu"}},
        {"run": {"workers": 4, "shard_size": 7, "retry_errors": True, "output": "elsewhere"}},
        {"input": {"manifest": "elsewhere.jsonl", "limit": 3}},
    ],
)
def test_what_does_not_change_answers_leaves_it(settings: dict[str, Any]) -> None:
    assert make(settings) == make({})


def test_revision_and_carried_columns_count() -> None:
    assert make({}, revision="r2") != make({})
    assert make({}, columns=pa.schema({"kind": pa.string()})) != make({})


def test_it_survives_json() -> None:
    settings = {"prune": {"method_options": {"seed": 3}}, "frames": {"fps": 2}}
    assert json.loads(json.dumps(make(settings))) == make(settings)


def test_versions_name_what_matters() -> None:
    assert {"python", "pipeline", "torch", "transformers", "ray", "decord2", "av"} <= set(versions())


class TestRunRecord:
    def test_it_says_how_far_a_run_is_and_how_it_ended(self, tmp_path: Path) -> None:
        seconds = [0.0]
        folder = OutputFolder(tmp_path)
        with RunRecord(folder, JobConfig(), {"a": 1}, rows=10, done=4, clock=lambda: seconds[0]) as record:
            first = folder.read_run()
            assert first is not None
            assert (first["state"], first["rows"], first["done"], first["fingerprint"]) == ("running", 10, 4, {"a": 1})
            record(ClipDone(rows=3, errors=1))
            assert folder.read_run() == first, "no heartbeat before its time"
            seconds[0] = HEARTBEAT_SECONDS
            record(Tick())
            later = folder.read_run()
            assert later is not None and (later["done"], later["errors"]) == (7, 1)
            record.state, record.closing = "finished", {"summary": {"ok": 6}}
        last = folder.read_run()
        assert last is not None and (last["state"], last["summary"]) == ("finished", {"ok": 6})
        assert "heartbeat" not in last and last["started"] == first["started"] and last["ended"]

    def test_a_run_that_raises_has_failed(self, tmp_path: Path) -> None:
        folder = OutputFolder(tmp_path)
        with pytest.raises(ZeroDivisionError), RunRecord(folder, JobConfig(), {}, rows=1, done=0):
            raise ZeroDivisionError
        assert folder.read_run()["state"] == "failed"  # type: ignore[index]

    def test_a_killed_run_can_be_told_from_a_running_one(self, tmp_path: Path) -> None:
        folder = OutputFolder(tmp_path)
        with RunRecord(folder, JobConfig(), {}, rows=1, done=0):
            record = folder.read_run()
        assert record is not None and run_state(record) == "running"
        silent = datetime.fromisoformat(record["heartbeat"]) - timedelta(seconds=HEARTBEAT_SECONDS * MISSED_BEATS + 2)
        assert run_state(record | {"heartbeat": silent.isoformat()}) == "killed"
        assert run_state({"state": "interrupted"}) == "interrupted"
