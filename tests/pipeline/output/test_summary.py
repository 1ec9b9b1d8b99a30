"""The summary counts what the rows say."""

from typing import Any

import pyarrow as pa

from pipeline.manifest import ROW_SCHEMA
from pipeline.output import ANSWER_SCHEMA
from pipeline.output.summary import format_summary, summarize


def table(rows: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([*ROW_SCHEMA, *ANSWER_SCHEMA])
    return pa.Table.from_pylist([{"sample_id": str(i)} | row for i, row in enumerate(rows)], schema=schema)


def answer(correct: bool | None, **columns: Any) -> dict[str, Any]:
    shared = {"visual_tokens_full": 100, "visual_tokens_kept": 25.0, "seconds_vision": 0.5, "seconds_decode": 0.25}
    known = {"answer": None if correct is None else "yes"}
    return {"status": "ok", "correct": correct, "peak_memory_bytes": 2**20} | known | shared | columns


def test_summary_of_answers_and_errors() -> None:
    error = {"status": "error", "error_type": "video_missing"}
    other = {"status": "error", "error_type": "worker_died"}
    large = answer(None, visual_tokens_full=300, visual_tokens_kept=75.0, peak_memory_bytes=2**21)
    summary = summarize(table([answer(True), answer(False), other, error, error, answer(True), large]))
    assert summary == {
        "rows": 7,
        "ok": 4,
        "errors": {"video_missing": 2, "worker_died": 1},
        "scored": 3,
        "accuracy": 2 / 3,
        "scored_errors": 0,
        "accuracy_answered": 2 / 3,
        "multiple_choice": 0,
        "unread": 0,
        "visual_tokens_full": 150,
        "visual_tokens_kept": 37.5,
        "kept_fraction": 0.25,
        "seconds": {"decode": 1.0, "vision": 2.0, "selection": 0.0, "prefill": 0.0, "generate": 0.0},
        "decode_cores_per_worker": 0.5,
        "peak_memory_bytes": 2**21,
    }
    text = format_summary(summary, {"videos": 5, "rows": 7, "seconds": 2.5})
    for words in (
        "7: 4 ok, 3 with an error",
        "2 x video_missing",
        "66.7 % of 3 rows",
        "(25.0 %)",
        "0.5 cores that decode",
        "2 videos/s",
    ):
        assert words in text
    assert "170 videos/s" in format_summary(summary, {"videos": 5000, "rows": 10000, "seconds": 29.9})


def test_errors_with_a_known_answer_stay_in_the_denominator() -> None:
    error = {"status": "error", "error_type": "bad_row"}
    rows = [answer(True), answer(False), error | {"answer": "yes"}, error | {"answer_index": 0}, error]
    summary = summarize(table(rows))
    assert (summary["scored"], summary["accuracy"]) == (4, 0.25)
    assert (summary["scored_errors"], summary["accuracy_answered"]) == (2, 0.5)
    text = format_summary(summary)
    assert "25.0 % of 4 rows with a known answer" in text
    assert "2 of them have an error and count as wrong; 50.0 % of the others" in text


def test_replies_that_name_no_option_are_counted() -> None:
    unread = answer(False, options=["red", "blue"], choice=None)
    summary = summarize(table([unread, unread | {"choice": 1}, answer(False)]))
    assert summary["unread"] == 1
    assert "1 replies to multiple choice name no option" in format_summary(summary)


def test_summary_without_any_answer() -> None:
    for rows in ([], [{"status": "error", "error_type": "video_missing"}]):
        summary = summarize(table(rows))
        assert (summary["rows"], summary["ok"], summary["accuracy"]) == (len(rows), 0, None)
        assert "accuracy" not in format_summary(summary)


def test_a_run_that_ended_before_it_began_has_no_pace() -> None:
    assert "this run" not in format_summary(summarize(table([])), {"videos": 0, "rows": 0, "seconds": 0.0})
