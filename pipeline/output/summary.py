"""Counts, accuracy and costs of a job, computed from the rows of its output."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output.progress import two_digits

ALL_PHASES = ("decode", "vision", "selection", "prefill", "generate")

SCORINGS = {
    "generate": "options shown, the letter or the option read from what is generated",
    "likelihood": "options not shown, the most likely option text; compares with no published number",
    "likelihood-letter": "options shown, the most likely letter",
}
"""What each value of `choice_scoring` means."""

SUMMARY_COLUMNS = (
    "sample_id",
    "status",
    "error_type",
    "options",
    "answer",
    "answer_index",
    "choice",
    "correct",
    "visual_tokens_full",
    "visual_tokens_kept",
    "peak_memory_bytes",
    *(f"seconds_{phase}" for phase in ALL_PHASES),
)
"""The columns that `summarize` reads."""


Summary = dict[str, Any]
"""What `run.json` says of the rows, and what is printed of them: counts, accuracy, costs."""


def summarize(table: pa.Table) -> Summary:
    """Counts, accuracy and costs of the rows of an output.

    `accuracy` is over the rows whose right answer is known, those with an error included: they are not right.
    `accuracy_answered` leaves them out. Seconds are sums over rows; what the questions of a clip share is in the first
    of them. `decode_cores_per_worker` is the time of decoding over that of the model: so many cores must decode to keep
    one worker busy.
    """
    # (rows,) masks: answered, and with a known right answer
    ok = pc.equal(table["status"], "ok")
    known = pc.or_(pc.is_valid(table["answer"]), pc.is_valid(table["answer_index"]))
    scored, right = _count(known), pc.sum(table["correct"]).as_py() or 0
    # Multiple choice that was answered, but no option could be read from the reply.
    unread = pc.and_(pc.and_(ok, pc.is_valid(table["options"])), pc.is_null(table["choice"]))
    # Counts by error type, the most frequent first.
    errors = pc.value_counts(table["error_type"].drop_null()).to_pylist()
    full, kept = (pc.sum(table[f"visual_tokens_{which}"]).as_py() for which in ("full", "kept"))
    # Arrow gives None for sums and means without values; counts become 0, means stay None.
    seconds = {phase: pc.sum(table[f"seconds_{phase}"]).as_py() or 0.0 for phase in ALL_PHASES}
    model_seconds = sum(seconds.values()) - seconds["decode"]
    return {
        "rows": table.num_rows,
        "ok": _count(ok),
        "errors": {count["values"]: count["counts"] for count in sorted(errors, key=lambda count: -count["counts"])},
        "scored": scored,
        "accuracy": right / scored if scored else None,
        "scored_errors": _count(pc.and_(known, pc.invert(ok))),
        "accuracy_answered": pc.mean(table["correct"]).as_py(),
        "multiple_choice": _count(pc.is_valid(table["options"])),
        "unread": _count(unread),
        "visual_tokens_full": pc.mean(table["visual_tokens_full"]).as_py(),
        "visual_tokens_kept": pc.mean(table["visual_tokens_kept"]).as_py(),
        "kept_fraction": kept / full if full else None,
        "seconds": seconds,
        "decode_cores_per_worker": seconds["decode"] / model_seconds if model_seconds else None,
        "peak_memory_bytes": pc.max(table["peak_memory_bytes"]).as_py(),
    }


def _count(true: pa.ChunkedArray) -> int:
    return pc.sum(true).as_py() or 0


def scoring_line(choice_scoring: str) -> str:
    """How multiple choice was answered, for people."""
    return f"choices   {choice_scoring}: {SCORINGS[choice_scoring]}"


def format_summary(summary: Summary, counts: Mapping[str, float] | None = None) -> str:
    """The closing lines of a job, for people.

    Args:
        counts: of this run: `videos`, `rows` and `seconds`; None when there was nothing left to do. No seconds have
            passed when it ended before the first worker was there.
    """
    # A line is printed only where it says something: no errors, no line about them.
    failed = summary["rows"] - summary["ok"]
    lines = [f"rows      {summary['rows']}: {summary['ok']} ok, {failed} with an error"]
    lines += [f"          {count} x {kind}" for kind, count in summary["errors"].items()]
    if summary["accuracy"] is not None:
        lines.append(f"accuracy  {100 * summary['accuracy']:.1f} % of {summary['scored']} rows with a known answer")
    # Errors count as wrong, so the accuracy of the answered rows stands beside it.
    if summary["scored_errors"]:
        without = summary["accuracy_answered"]
        others = "" if without is None else f"; {100 * without:.1f} % of the others"
        lines.append(f"          {summary['scored_errors']} of them have an error and count as wrong{others}")
    if summary["unread"]:
        lines.append(f"          {summary['unread']} replies to multiple choice name no option; they count as wrong")
    if summary["multiple_choice"] and "choice_scoring" in summary:
        lines.append(scoring_line(summary["choice_scoring"]))
    if summary["kept_fraction"] is not None:
        kept, full = summary["visual_tokens_kept"], summary["visual_tokens_full"]
        lines.append(f"tokens    {kept:.1f} of {full:.1f} visual tokens kept ({100 * summary['kept_fraction']:.1f} %)")
    # Phases as shares of their sum; they are times of work, which overlaps between workers.
    if any(summary["seconds"].values()):
        total = sum(summary["seconds"].values())
        parts = (f"{phase} {value:.1f} s ({100 * value / total:.0f} %)" for phase, value in summary["seconds"].items())
        lines.append(f"time      {', '.join(parts)}")
    if summary["decode_cores_per_worker"]:
        lines.append(
            f"balance   {two_digits(summary['decode_cores_per_worker'])} cores that decode keep one worker busy"
        )
    if summary["peak_memory_bytes"]:
        lines.append(f"memory    {summary['peak_memory_bytes'] / 2**20:.0f} MiB at most in a worker")
    # Videos a second of this run alone; rows done earlier took other time.
    if counts is not None and counts["seconds"]:
        work = f"{counts['videos']} videos, {counts['rows']} rows in {counts['seconds']:.1f} s"
        lines.append(f"this run  {work}: {two_digits(counts['videos'] / counts['seconds'])} videos/s")
    return "\n".join(lines)
