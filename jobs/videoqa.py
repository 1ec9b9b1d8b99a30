"""Answers the questions of a manifest about its videos, one Parquet row for each.

Without --manifest it renders a small set of videos with questions, and answers those.
Exits with 0 when all rows have a result, 2 when more than --max-error-rate of them have an error, 1 when a setting,
the manifest or the output folder is wrong, and 130 when it was interrupted.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import job
from pipeline.cluster import ClipResult
from pipeline.config import JobConfig, parse
from pipeline.errors import ConfigError
from pipeline.manifest import Clip, Manifest, load_manifest
from pipeline.output import ANSWER_SCHEMA, OutputFolder, ShardWriter, open_output
from pipeline.output.record import fingerprint
from pipeline.output.summary import SUMMARY_COLUMNS, format_summary, summarize
from pipeline.stages import error_columns

DEMO_OUTPUT = Path("output/demo")
DEMO_CLIPS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job that the command line describes; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = parse(JobConfig, arguments, __doc__)
        with open_output(job.output_path(config.run.output, config.input.manifest, DEMO_OUTPUT)) as folder:
            return run(config, folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(config: JobConfig, folder: OutputFolder) -> int:
    """Does what is missing in the folder, and says what came of it."""
    from pipeline.model.answering import build_method  # with torch, which --help can do without
    from pipeline.model.load import model_revision
    from pipeline.worker import ClipAnswerer

    manifest = load_manifest(
        config.input.manifest or job.render_demo(folder.path / "videos", DEMO_CLIPS),
        reserved=ANSWER_SCHEMA.names,
        limit=config.input.limit,
    )
    method = build_method(config.prune)
    made_by = {"model": config.model.model, "method": config.prune.method, "keep_ratio": method.retention_ratio}
    identity = fingerprint(config, model_revision(config.model.model, config.model.revision), manifest.extras.schema)
    if config.run.overwrite:
        folder.clear()
    folder.claim(identity)
    plan = job.make_plan(manifest, folder, retry_errors=config.run.retry_errors)
    pace, summary = job.Pace(), {}

    def work() -> None:
        build = partial(ClipAnswerer, config)
        engine = job.engine_config(config.run, config.frames.decode_timeout)
        columns = partial(output_rows, made_by=made_by, attempts=plan.attempts)
        job.answer_all(build, engine, config.run, ShardWriter(folder, manifest), manifest, plan, columns, pace)

    def close() -> dict[str, Any]:
        summary.update(_summarize(folder, manifest))
        return {"this_run": vars(pace), "summary": summary}

    state = job.run_recorded(folder, config, identity, len(manifest.rows), work, close)
    print(format_summary(summary, vars(pace) if plan.rows else None))
    print(f"output    {folder.path.absolute()}")
    if state == "interrupted":
        return job.INTERRUPTED
    failed = len(manifest.rows) - summary["ok"]
    return 2 if failed > config.run.max_error_rate * len(manifest.rows) else 0


def output_rows(result: ClipResult[Clip], *, made_by: Mapping[str, Any], attempts: Mapping[str, int]) -> job.Answered:
    """The output columns of each row of a clip, whether it has answers or an error."""
    rows = result.clip.rows
    answers = result.answers if result.error is None else [error_columns(result.error)] * len(rows)
    columns = [
        {**made_by, "attempt": result.attempt + attempts.get(row.sample_id, 0)} | answer
        for row, answer in zip(rows, answers, strict=True)
    ]
    return job.pair(rows, columns)


def _summarize(folder: OutputFolder, manifest: Manifest) -> dict[str, Any]:
    """The summary of the manifest's rows; rows of the folder that the manifest does not have are counted apart."""
    table = folder.read(SUMMARY_COLUMNS)
    mine = job.asked_in(manifest, table)
    return summarize(mine) | {"not_in_manifest": table.num_rows - mine.num_rows}


if __name__ == "__main__":
    sys.exit(main())
