"""Results may stand beside each other when everything that an answer depends on is the same, and only then."""

import json
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import JobConfig, from_mapping
from pipeline.output.record import fingerprint, versions

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
        {"prune": {"keep_ratio": 0.5}},
        {"prune": {"method_options": {"key_score": "large"}}},
        {"answer": {"prompt": "Say: {question}"}},
        {"answer": {"max_new_tokens": 8}},
    ],
)
def test_what_changes_answers_changes_the_fingerprint(settings: dict[str, Any]) -> None:
    assert make(settings) != make({})


@pytest.mark.parametrize(
    "settings",
    [
        {"frames": {"num_frames": 8}},
        {"frames": {"decode_timeout": 5.0}},
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
