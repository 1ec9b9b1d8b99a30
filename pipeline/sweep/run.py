"""A whole sweep: every cell's answers, the costs, the gallery and the report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from pipeline import commandline
from pipeline.cluster import Answerer, Build, ClipResult
from pipeline.config import SweepJobConfig
from pipeline.job import Answered, Job, Run, rows_of_manifest, run_job
from pipeline.manifest import Clip, group_clips
from pipeline.output import ANSWER_SCHEMA, error_columns, write_table
from pipeline.output.summary import Summary, scoring_line
from pipeline.sweep.cells import FULL, Record, cells_of, named_methods
from pipeline.sweep.gallery import write_gallery
from pipeline.sweep.summary import summarize_cells
from pipeline.sweep.terminal import print_table

if TYPE_CHECKING:
    from pipeline.sweep.costs import Measured  # with torch, which --help can do without

DESCRIPTION = """Compares pruning methods at several keep ratios on one manifest, and writes a report to look at.

Every cell (method, ratio, frames, seed) answers the same questions: one Ray run loads the model once a worker, decodes
each clip once, and runs the vision tower once for all methods that can share it. Then one worker, alone on the machine,
times the cells in turn. Without --manifest it renders a small set of videos with questions.

OUTPUT/answers holds a row for each question and cell, OUTPUT/cells.parquet a row for each cell, OUTPUT/report.html,
report.md and plots/ what people read. Exit codes are those of the main job; the same command continues.
"""
ANSWERS = "answers"
CELLS = "cells.parquet"
SWEEP_SCHEMA = pa.schema([*ANSWER_SCHEMA, pa.field("cell", pa.string()), pa.field("seed", pa.int32())])
SUMMARY_COLUMNS = (
    "cell",
    "sample_id",
    "video",
    "start",
    "end",
    "answer",
    "answer_index",
    "correct",
    "prediction",
    "status",
    "error_type",
    "error",
    "visual_tokens_full",
    "visual_tokens_kept",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep that the command line describes; returns its exit code."""
    return commandline.main(SweepJobConfig, run, arguments, DESCRIPTION)


def run(config: SweepJobConfig) -> int:
    """Do the sweep that the settings describe, or what is missing of it; returns the exit code (see `run_job`).

    Raises:
        ConfigError: a setting, the manifest, the model or the output folder is wrong.
    """
    return run_job(SweepJob(config))


class SweepJob(Job):
    """Many methods, ratios and frame counts on one model; a row for each question and cell."""

    schema: ClassVar[pa.Schema] = SWEEP_SCHEMA
    demo_output: ClassVar[Path] = Path("output/sweep")
    config: SweepJobConfig

    def __init__(self, config: SweepJobConfig) -> None:
        super().__init__(dataclasses.replace(config, sweep=named_methods(config.sweep)))
        self.cells = cells_of(self.config.sweep)

    @property
    def answers_folder(self) -> Path:
        return self.output / ANSWERS

    def build(self) -> Build:
        print(f"{len(self.cells)} cells to answer", file=sys.stderr)
        return partial(build_answerer, self.config)

    def columns(self, result: ClipResult[Clip], attempts: Mapping[str, int]) -> Answered:
        rows = result.clip.rows
        failed = None if result.error is None else error_columns(result.error)
        paired = []
        for number, cell in enumerate(self.cells):
            ratio = 1.0 if cell.method == FULL else cell.keep_ratio
            made_by = {"cell": cell.name, "method": cell.method, "keep_ratio": ratio, "seed": cell.seed}
            answers = [failed] * len(rows) if failed else result.answers[number]
            for row, answer in zip(rows, answers, strict=True):
                attempt = result.attempt + attempts.get(row.sample_id, 0)
                paired.append((row, {"model": self.config.model.model, **made_by, "attempt": attempt, **answer}))
        return paired

    def finish(self, run: Run) -> None:
        """Measure the cells, and write their summary and the gallery."""
        from pipeline.sweep.costs import merge_costs

        sweep, manifest = self.config.sweep, run.manifest
        kind = sweep.kind if sweep.kind in manifest.extras.schema.names else None
        measured = self._measure(run)
        rows = rows_of_manifest(manifest, run.folder.read([*SUMMARY_COLUMNS, *([kind] if kind else [])]))
        # Intervals are over clips, so each row says which clip it is of.
        spans = rows.select(["video", "start", "end"]).to_pylist()
        clips = [f"{row['video']} {row['start']} {row['end']}" for row in spans]
        facts: dict[str, Record] = {}
        for _, each in measured:
            facts = {**each.facts, **facts}
        costs = merge_costs([each for _, each in measured[: sweep.cost_clips]])
        rows = rows.append_column("clip", pa.array(clips, pa.string()))
        table = summarize_cells(self.cells, rows, facts, costs, kind)
        write_table(table, self.output / CELLS)
        write_gallery(self.config, self.output, self.cells, measured[: sweep.gallery_clips])
        print_table(table)

    def _measure(self, run: Run) -> list[tuple[Clip, Measured]]:
        """What a single worker, alone, finds on the first clips; clips with an error are passed over."""
        wanted = max(1, self.config.sweep.cost_clips, self.config.sweep.gallery_clips)
        clips = group_clips(run.manifest.sound)[:wanted]
        if not clips:
            return []
        results = run.answer_alone(partial(build_measurer, self.config), clips)
        found = [(result.clip, result.answers) for result in results if result.error is None]
        return sorted(found, key=lambda pair: pair[0].id)

    def summarize(self, run: Run) -> Summary:
        """Questions that are done, and those with an error in any cell."""
        total = len(run.manifest.rows)
        ids = {row.sample_id for row in run.manifest.rows}
        done = {name: entry for name, entry in run.folder.done().items() if name in ids}
        failed = total - len(done) + sum(entry.status == "error" for entry in done.values())
        scoring = {"choice_scoring": self.config.answer.choice_scoring}
        return {"rows": total, "done": len(done), "failed": failed} | scoring

    def report(self, run: Run, state: str, summary: Summary) -> None:
        from pipeline.sweep.report import write_report  # with matplotlib, which --help can do without

        if state == "finished":
            run.folder.copy_run(self.output)
            if any(row.options for row in run.manifest.rows):
                print(scoring_line(self.config.answer.choice_scoring))
            if summary["failed"]:
                print(f"errors    {summary['failed']} questions; where the answer is known they count as wrong")
            print(f"report    {write_report(self.output).absolute()}")


def build_answerer(config: SweepJobConfig, threads: int) -> Answerer:
    """What the workers of a sweep hold; runs in the worker's process."""
    from pipeline.sweep.worker import SweepAnswerer

    return SweepAnswerer(config, True, threads)


def build_measurer(config: SweepJobConfig, threads: int) -> Answerer:
    """What the worker that measures holds; nothing is shared between its cells."""
    from pipeline.sweep.costs import SweepMeasurer

    return SweepMeasurer(config, False, threads)
