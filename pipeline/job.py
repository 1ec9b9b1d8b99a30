"""What the jobs share: which rows are left to do, answering them shard by shard, and the record of a run."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cluster import Build, ClipResult, Engine, EngineConfig
from pipeline.config import RunConfig, to_mapping
from pipeline.errors import ConfigError
from pipeline.manifest import Clip, Manifest, Row, cut_shards, group_clips
from pipeline.output import OutputFolder, ShardWriter
from pipeline.output.progress import Progress, deferred_interrupts
from pipeline.output.record import machine, versions

INTERRUPTED = 130

Answered = list[tuple[Row, dict[str, Any]]]
"""Output columns, each with the row that they answer."""


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
        folder.drop(again)
    return Plan([row for row in manifest.rows if row.sample_id not in done or row.sample_id in again], again)


def answer_all(
    build: Build,
    settings: EngineConfig,
    run: RunConfig,
    writer: ShardWriter,
    manifest: Manifest,
    plan: Plan,
    answers: Callable[[ClipResult[Clip]], Answered],
    pace: Pace,
) -> None:
    """Answer the rows of the plan and write a part for each shard that is complete.

    Args:
        answers: turns a clip's result into output rows.
        pace: is brought up to date, also when the run ends early.
    """
    clips = group_clips(plan.rows)
    if not clips:
        return
    writer.expect(cut_shards(clips, run.shard_size))
    done = len(manifest.rows) - len(plan.rows)
    progress = Progress(len(manifest.rows), initial=done, interval=run.progress_interval)
    began = time.monotonic()
    with Engine[Clip](build, settings) as engine, shown(progress) as tick:
        try:
            for result in engine.run(clips, tick):
                rows = answers(result)
                writer.add(result.clip, rows)
                failed = {row.sample_id for row, columns in rows if columns["status"] == "error"}
                progress.add(len(result.clip.rows), len(failed))
                pace.videos, pace.rows = pace.videos + 1, pace.rows + len(result.clip.rows)
        finally:
            pace.seconds = time.monotonic() - began
            writer.flush()


@contextmanager
def shown(progress: Progress) -> Iterator[Callable[[], None]]:
    """Shows the progress of an engine's run, which calls what this yields; interrupts come there, and only there."""
    with deferred_interrupts() as check_interrupt:

        def tick() -> None:
            check_interrupt()
            progress.tick()

        try:
            yield tick
        finally:
            progress.close()


def asked_in(manifest: Manifest, table: pa.Table) -> pa.Table:
    """The rows of a folder's table whose `sample_id` the manifest has; a folder may hold more."""
    ids = {row.sample_id for row in manifest.rows}
    return table.filter(pa.array([name in ids for name in table["sample_id"].to_pylist()], pa.bool_()))


def engine_config(run: RunConfig, decode_timeout: float) -> EngineConfig:
    return EngineConfig(
        workers=run.workers,
        gpus_per_worker=run.gpus_per_worker,
        decode_ahead=run.decode_ahead,
        decode_timeout=decode_timeout,
    )


def single_worker(config: EngineConfig) -> EngineConfig:
    """The same with one worker and nothing decoded beside it, for measurements."""
    return dataclasses.replace(config, workers=1, decode_ahead=0)


def run_recorded(
    folder: OutputFolder,
    config: Any,
    identity: Mapping[str, Any],
    rows: int,
    work: Callable[[], None],
    close: Callable[[], Mapping[str, Any]],
) -> str:
    """Do the work with `run.json` saying, before and after, what is done and how it ended; returns its state.

    Args:
        close: what `run.json` says at the end beside the state, made also when the work failed.
    """
    record: dict[str, Any] = {"started": now(), "rows": rows, "versions": versions(), "machine": machine()}
    record |= {"config": to_mapping(config), "fingerprint": identity}
    folder.write_run({"state": "running"} | record)
    state = "failed"
    try:
        work()
        state = "finished"
    except KeyboardInterrupt as interrupt:
        state = "interrupted"
        print(f"interrupted ({interrupt}); the same command goes on from here", file=sys.stderr)
    finally:
        folder.write_run({"state": state, "ended": now()} | dict(close()) | record)
    return state


def render_demo(folder: Path, clips: int) -> str:
    """The manifest of rendered videos; they are made once."""
    from pipeline.embedded.demo import write_dataset

    if not folder.exists():
        print(f"rendering {clips} videos to {folder.absolute()}", file=sys.stderr)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_dataset(unfinished, clips)
        unfinished.rename(folder)
    return str(folder / "manifest.jsonl")


def output_path(output: Path | None, manifest: str | None, demo: Path) -> Path:
    """The folder for the results.

    Raises:
        ConfigError: a manifest without one.
    """
    if output is None and manifest is not None:
        raise ConfigError("--manifest needs an --output folder for the results")
    return output or demo


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def pair(rows: Sequence[Row], columns: Sequence[dict[str, Any]]) -> Answered:
    return list(zip(rows, columns, strict=True))
