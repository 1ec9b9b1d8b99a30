"""The main job: every question of a manifest answered about its video, one Parquet row for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from pipeline import commandline
from pipeline.cluster import Answerer, Build, ClipResult
from pipeline.config import CALIBRATED, JobConfig
from pipeline.job import Answered, Job, Run, rows_of_manifest, run_job
from pipeline.manifest import Clip
from pipeline.output import ANSWER_SCHEMA, error_columns
from pipeline.output.summary import SUMMARY_COLUMNS, Summary, format_summary, summarize

DESCRIPTION = """Answers the questions of a manifest about its videos, one Parquet row for each.

Without --manifest it renders a small set of videos with questions, and answers those.
Exits with 0 when all rows have a result, 2 when more than --max-error-rate of them have an error, 1 when a setting,
the manifest or the output folder is wrong, and 130 when it was interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the command line describes; returns its exit code."""
    return commandline.main(JobConfig, run, arguments, DESCRIPTION)


def run(config: JobConfig) -> int:
    """Answer what is missing in the output folder; returns the exit code (see `run_job`).

    Raises:
        ConfigError: a setting, the manifest, the model or the folder is wrong.
    """
    return run_job(VideoQAJob(config))


class VideoQAJob(Job):
    """One model with one pruning method.

    Raises:
        ConfigError: an unknown method or method option.
    """

    schema: ClassVar[pa.Schema] = ANSWER_SCHEMA
    demo_output: ClassVar[Path] = Path("output/demo")
    config: JobConfig

    def __init__(self, config: JobConfig) -> None:
        from pipeline.model.answering import build_method  # with torch, which --help can do without

        super().__init__(config)
        ratio = config.prune.keep_ratio
        if config.prune.method != CALIBRATED:  # what that is, the workers find beside the model
            ratio = build_method(config.prune).retention_ratio
        self.made_by = {"model": config.model.model, "method": config.prune.method, "keep_ratio": ratio}

    def build(self) -> Build:
        return partial(build_answerer, self.config)

    def columns(self, result: ClipResult[Clip], attempts: Mapping[str, int]) -> Answered:
        rows = result.clip.rows
        answers = result.answers if result.error is None else [error_columns(result.error)] * len(rows)
        return [
            (row, {**self.made_by, "attempt": result.attempt + attempts.get(row.sample_id, 0)} | answer)
            for row, answer in zip(rows, answers, strict=True)
        ]

    def finish(self, run: Run) -> None:
        """Does nothing: the parts are the job's result."""

    def summarize(self, run: Run) -> Summary:
        """The summary of the manifest's rows; rows of the folder that the manifest does not have are counted apart."""
        table = run.folder.read(SUMMARY_COLUMNS)
        asked = rows_of_manifest(run.manifest, table)
        summary = summarize(asked) | {"choice_scoring": self.config.answer.choice_scoring}
        others = {"not_in_manifest": table.num_rows - asked.num_rows}
        return summary | others | {"failed": len(run.manifest.rows) - summary["ok"]}

    def report(self, run: Run, state: str, summary: Summary) -> None:
        counts = dataclasses.asdict(run.counts)
        print(format_summary(summary, counts if run.plan.clips else None))
        print(f"output    {run.folder.path.absolute()}")


def build_answerer(config: JobConfig, threads: int) -> Answerer:
    """Make the answerer of a worker of the main job; runs in the worker's process."""
    from pipeline.model.answerer import ClipAnswerer

    return ClipAnswerer(config, threads)
