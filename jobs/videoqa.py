"""Answers the questions of a manifest about its videos, one Parquet row for each.

Without --manifest it renders a small set of videos with questions, and answers those.
Exits with 0 when all rows have a result, 2 when more than --max-error-rate of them have an error, 1 when a setting,
the manifest or the output folder is wrong, and 130 when it was interrupted.
"""

import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import JobConfig, parse, to_mapping
from pipeline.engine import ClipResult, Engine, EngineConfig
from pipeline.errors import ConfigError
from pipeline.fingerprint import fingerprint, versions
from pipeline.manifest import Clip, Manifest, Row, cut_shards, group_clips, load_manifest
from pipeline.output import ANSWER_SCHEMA, OutputFolder, ShardWriter, open_output
from pipeline.progress import Progress, deferred_interrupts
from pipeline.stages import error_columns
from pipeline.summary import SUMMARY_COLUMNS, format_summary, summarize

DEMO_OUTPUT = Path("output/demo")
DEMO_CLIPS = 32
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job that the command line describes; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = parse(JobConfig, arguments, __doc__)
        with open_output(_output_path(config)) as folder:
            return run(config, folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(config: JobConfig, folder: OutputFolder) -> int:
    """Does what is missing in the folder, and says what came of it."""
    from pipeline.answers import build_method  # with torch, which --help can do without
    from pipeline.model import model_revision

    manifest = load_manifest(
        config.input.manifest or _render_demo(folder.path / "videos"),
        reserved=ANSWER_SCHEMA.names,
        limit=config.input.limit,
    )
    method = build_method(config.prune)
    made_by = {"model": config.model.model, "method": config.prune.method, "keep_ratio": method.retention_ratio}
    identity = fingerprint(config, model_revision(config.model.model, config.model.revision), manifest.extras.schema)
    if config.run.overwrite:
        folder.clear()
    folder.claim(identity)
    plan = make_plan(manifest, folder, retry_errors=config.run.retry_errors)

    record: dict[str, Any] = {"started": _now(), "rows": len(manifest.rows), "versions": versions()}
    record |= {"config": to_mapping(config), "fingerprint": identity}
    folder.write_run({"state": "running"} | record)
    state, pace = "failed", Pace()
    try:
        answer_all(config, folder, manifest, plan, pace, made_by)
        state = "finished"
    except KeyboardInterrupt as interrupt:
        state = "interrupted"
        print(f"interrupted ({interrupt}); the same command goes on from here", file=sys.stderr)
    finally:
        summary = _summarize(folder, manifest)
        ended = {"state": state, "ended": _now(), "this_run": vars(pace), "summary": summary}
        folder.write_run(ended | record)
    print(format_summary(summary, vars(pace) if plan.rows else None))
    print(f"output    {folder.path.absolute()}")
    if state == "interrupted":
        return INTERRUPTED
    failed = len(manifest.rows) - summary["ok"]
    return 2 if failed > config.run.max_error_rate * len(manifest.rows) else 0


@dataclass
class Pace:
    """What this run has done, and in how many seconds."""

    videos: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The rows to do, and how often those that are done again have been tried."""

    rows: list[Row]
    attempts: Mapping[str, int]


def make_plan(manifest: Manifest, folder: OutputFolder, *, retry_errors: bool) -> Plan:
    """Which rows are missing in the folder; takes those with an error out of it when they are to be done again.

    Raises:
        ConfigError: an id in the folder belongs to another question than in the manifest.
    """
    done = folder.done()
    for row in manifest.rows:
        if row.sample_id in done and done[row.sample_id].content != row.content:
            raise ConfigError(
                f"{folder.path} holds an answer to another question under sample_id {row.sample_id!r}: "
                f"{done[row.sample_id].content} there, {row.content} in the manifest. Choose another --output"
            )
    again = {name: entry.attempt for name, entry in done.items() if retry_errors and entry.status == "error"}
    if again:
        folder.drop_errors()
    return Plan([row for row in manifest.rows if row.sample_id not in done or row.sample_id in again], again)


def answer_all(
    config: JobConfig, folder: OutputFolder, manifest: Manifest, plan: Plan, pace: Pace, made_by: dict[str, Any]
) -> None:
    """Answers the rows of the plan and writes a part for each shard that is complete.

    Args:
        made_by: columns that are the same in all rows.
    """
    from pipeline.worker import ClipAnswerer

    clips = group_clips(plan.rows)
    if not clips:
        return
    writer = ShardWriter(folder, manifest, list(cut_shards(clips, config.run.shard_size)))
    progress = Progress(
        len(manifest.rows), initial=len(manifest.rows) - len(plan.rows), interval=config.run.progress_interval
    )
    settings = EngineConfig(
        workers=config.run.workers,
        gpus_per_worker=config.run.gpus_per_worker,
        decode_ahead=config.run.decode_ahead,
        decode_timeout=config.frames.decode_timeout,
    )
    began = time.monotonic()
    engine: Engine[Clip] = Engine(partial(ClipAnswerer, config), settings)
    with engine, deferred_interrupts() as check_interrupt:

        def tick() -> None:
            check_interrupt()
            progress.tick()

        try:
            for result in engine.run(clips, tick):
                rows = [made_by | row for row in rows_of(result, plan.attempts)]
                writer.add(result.clip, rows)
                progress.add(len(rows), sum(row["status"] == "error" for row in rows))
                pace.videos, pace.rows = pace.videos + 1, pace.rows + len(rows)
        finally:
            pace.seconds = time.monotonic() - began
            writer.flush()
            progress.close()


def rows_of(result: ClipResult[Clip], attempts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The answer columns of each row of a clip, whether it has answers or an error.

    Args:
        attempts: how often rows had been tried before this run.
    """
    rows = result.clip.rows
    answers = result.answers if result.error is None else [error_columns(result.error)] * len(rows)
    return [
        {"attempt": result.attempt + attempts.get(row.sample_id, 0)} | answer
        for row, answer in zip(rows, answers, strict=True)
    ]


def _output_path(config: JobConfig) -> Path:
    if config.run.output is not None:
        return config.run.output
    if config.input.manifest is not None:
        raise ConfigError("--manifest needs an --output folder for the results")
    return DEMO_OUTPUT


def _render_demo(folder: Path) -> str:
    """The manifest of the rendered videos; they are made once."""
    from pipeline.embedded.demo import write_dataset

    if not folder.exists():
        print(f"rendering {DEMO_CLIPS} videos to {folder.absolute()}", file=sys.stderr)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_dataset(unfinished, DEMO_CLIPS)
        unfinished.rename(folder)
    return str(folder / "manifest.jsonl")


def _summarize(folder: OutputFolder, manifest: Manifest) -> dict[str, Any]:
    """The summary of the manifest's rows; rows of the folder that the manifest does not have are counted apart."""
    table = folder.read(SUMMARY_COLUMNS)
    ids = {row.sample_id for row in manifest.rows}
    mine = table.filter(pa.array([name in ids for name in table["sample_id"].to_pylist()], pa.bool_()))
    return summarize(mine) | {"not_in_manifest": table.num_rows - mine.num_rows}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
