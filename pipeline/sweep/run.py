"""A whole sweep: every cell's answers, the costs, the gallery and the report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import job
from pipeline.cluster import ClipResult, Engine
from pipeline.config import SweepJobConfig
from pipeline.manifest import Clip, Manifest, group_clips, load_manifest
from pipeline.output import ANSWER_SCHEMA, RUN_FILE, OutputFolder, ShardWriter, open_output
from pipeline.output.progress import Progress
from pipeline.output.record import fingerprint
from pipeline.stages import error_columns
from pipeline.sweep.cells import FULL, Cell, cells_of, named_methods
from pipeline.sweep.gallery import write_gallery
from pipeline.sweep.summary import summarize_cells
from pipeline.sweep.terminal import print_table

DEMO_OUTPUT = Path("output/sweep")
DEMO_CLIPS = 32
ANSWERS = "answers"
CELLS = "cells.parquet"
SWEEP_SCHEMA = pa.schema([*ANSWER_SCHEMA, pa.field("cell", pa.string()), pa.field("seed", pa.int32())])
SUMMARY_COLUMNS = (
    "cell",
    "sample_id",
    "video",
    "start",
    "end",
    "correct",
    "prediction",
    "status",
    "error_type",
    "error",
    "visual_tokens_full",
    "visual_tokens_kept",
)


def run(config: SweepJobConfig) -> int:
    """Does the sweep that the settings describe, or what is missing of it; returns the exit code.

    Raises:
        ConfigError: a setting, the manifest or the output folder is wrong.
    """
    output = job.output_path(config.run.output, config.input.manifest, DEMO_OUTPUT)
    with open_output(output / ANSWERS) as folder:
        return _run(config, output, folder)


def _run(config: SweepJobConfig, output: Path, folder: OutputFolder) -> int:
    """Answers what is missing, measures, and writes what people read."""
    from pipeline.model.load import model_revision  # with torch, which --help can do without
    from pipeline.sweep.report import write_report
    from pipeline.sweep.worker import SweepAnswerer

    config = dataclasses.replace(config, sweep=named_methods(config.sweep))
    cells = cells_of(config.sweep)
    manifest = load_manifest(
        config.input.manifest or job.render_demo(output / "videos", DEMO_CLIPS),
        reserved=SWEEP_SCHEMA.names,
        limit=config.input.limit,
    )
    revision = model_revision(config.model.model, config.model.revision)
    identity = fingerprint(config, revision, manifest.extras.schema)
    if config.run.overwrite:
        folder.clear()
    folder.claim(identity)
    plan = job.make_plan(manifest, folder, retry_errors=config.run.retry_errors)
    print(
        f"{len(cells)} cells, {len(manifest.rows)} questions, {len(group_clips(manifest.rows))} clips", file=sys.stderr
    )
    pace, summary = job.Pace(), {}

    def work() -> None:
        engine = job.engine_config(config.run, config.frames.decode_timeout)
        rows = partial(output_rows, cells=cells, model=config.model.model, attempts=plan.attempts)
        writer = ShardWriter(folder, manifest, SWEEP_SCHEMA)
        build = partial(SweepAnswerer, config, True)
        job.answer_all(build, engine, config.run, writer, manifest, plan, rows, pace)
        finish(config, output, folder, manifest, cells)

    def close() -> dict[str, Any]:
        summary.update(_count(folder, manifest))
        return {"this_run": vars(pace), "summary": summary}

    state = job.run_recorded(folder, config, identity, len(manifest.rows), work, close)
    if state == "interrupted":
        return job.INTERRUPTED
    (output / RUN_FILE).write_text((folder.path / RUN_FILE).read_text())
    print(f"report    {write_report(output).absolute()}")
    return 2 if summary["failed"] > config.run.max_error_rate * len(manifest.rows) else 0


def finish(
    config: SweepJobConfig, output: Path, folder: OutputFolder, manifest: Manifest, cells: Sequence[Cell]
) -> None:
    """Measures the cells and writes their summary and the gallery."""
    from pipeline.sweep.costs import Measured, merge_costs

    kind = config.sweep.kind if config.sweep.kind in manifest.extras.schema.names else None
    measured: list[tuple[Clip, Measured]] = measure(config, manifest)
    rows = folder.read([*SUMMARY_COLUMNS, *([kind] if kind else [])])
    rows = job.asked_in(manifest, rows)
    clips = [
        f"{row['video']} {row['start']} {row['end']}" for row in rows.select(["video", "start", "end"]).to_pylist()
    ]
    facts: dict[str, Mapping[str, Any]] = {}
    for _, each in measured:
        facts = {**each.facts, **facts}
    costs = merge_costs([each for _, each in measured[: config.sweep.cost_clips]])
    table = summarize_cells(cells, rows.append_column("clip", pa.array(clips, pa.string())), facts, costs, kind)
    pq.write_table(table, output / CELLS, compression="zstd")
    write_gallery(config, output, cells, measured[: config.sweep.gallery_clips])
    print_table(table)


def measure(config: SweepJobConfig, manifest: Manifest) -> list[tuple[Clip, Any]]:
    """What a single worker, alone, finds on the first clips; clips with an error are passed over."""
    from pipeline.sweep.costs import SweepMeasurer

    wanted = max(1, config.sweep.cost_clips, config.sweep.gallery_clips)
    clips = group_clips(manifest.rows)[:wanted]
    engine = job.engine_config(config.run, config.frames.decode_timeout)
    progress = Progress(len(clips), interval=config.run.progress_interval, unit="clip")
    found = []
    one = job.single_worker(engine)
    with Engine[Clip](partial(SweepMeasurer, config, False), one) as workers, job.shown(progress) as tick:
        for result in workers.run(clips, tick):
            progress.add(1, result.error is not None)
            if result.error is None:
                found.append((result.clip, result.answers))
    return sorted(found, key=lambda pair: pair[0].rows[0].index)


def output_rows(
    result: ClipResult[Clip], *, cells: Sequence[Cell], model: str, attempts: Mapping[str, int]
) -> job.Answered:
    """The output columns of each row of a clip in each cell."""
    rows = result.clip.rows
    failed = None if result.error is None else error_columns(result.error)
    paired = []
    for number, cell in enumerate(cells):
        ratio = 1.0 if cell.method == FULL else cell.keep_ratio
        made_by = {"cell": cell.name, "method": cell.method, "keep_ratio": ratio, "seed": cell.seed}
        answers = [failed] * len(rows) if failed else result.answers[number]
        for row, answer in zip(rows, answers, strict=True):
            attempt = result.attempt + attempts.get(row.sample_id, 0)
            paired.append((row, {"model": model, **made_by, "attempt": attempt, **answer}))
    return paired


def _count(folder: OutputFolder, manifest: Manifest) -> dict[str, int]:
    """Questions that are done, and those with an error in any cell."""
    ids = {row.sample_id for row in manifest.rows}
    done = {name: entry for name, entry in folder.done().items() if name in ids}
    failed = len(manifest.rows) - len(done) + sum(entry.status == "error" for entry in done.values())
    return {"rows": len(manifest.rows), "done": len(done), "failed": failed}
