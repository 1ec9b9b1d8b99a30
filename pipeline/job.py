"""A job from its settings to a finished folder: the plan of what is left to do, and the run that does it.

Both jobs take the same walk, `run_job`; what differs between them (how a clip is answered, its columns, what is made of
them at the end) is a `Job`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from pipeline.cluster import Build, ClipResult, Engine, EngineConfig
from pipeline.config import AnswerConfig, JobConfig, ModelConfig, RunConfig, SweepJobConfig
from pipeline.errors import ConfigError
from pipeline.manifest import Clip, Manifest, Row, cut_clips, load_manifest
from pipeline.model.template import ROW, message_templates, read_text
from pipeline.output import Columns, OutputFolder, ShardWriter, open_output
from pipeline.output.events import ClipDone, Event, Listener, PartWritten, Tick, WorkerLost
from pipeline.output.progress import Progress, deferred_interrupts
from pipeline.output.record import RunRecord, fingerprint
from pipeline.output.summary import Summary

INTERRUPTED = 130
TOO_MANY_ERRORS = 2

Answered = list[tuple[Row, Columns]]
"""Output columns, each with the row that they answer."""


@dataclass(frozen=True)
class WorkPlan:
    """The part of the manifest that is not done yet.

    Attributes:
        clips: in order, each with its number and its shard.
        attempts: how often the rows that are done again have been tried, by `sample_id`.
        finished: rows of the manifest that are done already.
    """

    clips: list[Clip]
    attempts: Mapping[str, int]
    finished: int

    @property
    def shard_sizes(self) -> Counter[int]:
        """Clips of each shard."""
        return Counter(clip.shard for clip in self.clips)


def make_plan(manifest: Manifest, folder: OutputFolder, *, shard_size: int, retry_errors: bool) -> WorkPlan:
    """The clips whose rows are missing in the folder.

    Rows with an error are taken out of the folder and planned again where `retry_errors` is set, or where the manifest
    has corrected them since.

    Raises:
        ConfigError: an id in the folder belongs to another question than in the manifest.
    """
    done = folder.done()
    # Same id, other question: refused where it has an answer, done again where it has an error.
    changed = [row for row in manifest.rows if row.sample_id in done and done[row.sample_id].content != row.content]
    corrected = {row.sample_id for row in changed}
    for row in changed:
        if done[row.sample_id].status != "error":
            raise ConfigError(
                f"{folder.path} holds an answer to another question under sample_id {row.sample_id!r}: "
                f"{done[row.sample_id].content} there, {row.content} in the manifest. Choose another --output"
            )
    # attempts so far, by id, of the rows that are taken out of the folder
    again = {
        name: entry.attempt
        for name, entry in done.items()
        if entry.status == "error" and (retry_errors or name in corrected)
    }
    if again:
        folder.drop(again)
    # Not in the folder, or just taken out of it; clips are cut from these alone.
    missing = [row for row in manifest.rows if row.sample_id not in done or row.sample_id in again]
    return WorkPlan(cut_clips(missing, shard_size), again, len(manifest.rows) - len(missing))


@dataclass
class Counts:
    """Clips and rows that a run has done so far, and its seconds."""

    videos: int = 0
    rows: int = 0
    errors: int = 0
    workers_lost: int = 0
    seconds: float = 0.0


class Job(ABC):
    """One kind of job: how its clips are answered, its output columns and its report. `run_job` does the rest.

    Attributes:
        config: all settings, those of the answers as `resolve_answers` leaves them.
        output: the folder that people look at.
    """

    schema: ClassVar[pa.Schema]
    """The columns that the job writes after the input columns."""
    demo_output: ClassVar[Path]
    demo_clips: ClassVar[int] = 32

    def __init__(self, config: JobConfig | SweepJobConfig) -> None:
        if config.run.output is None and config.input.manifest is not None:
            raise ConfigError("--manifest needs an --output folder for the results")
        self.config = dataclasses.replace(config, answer=resolve_answers(config.answer, config.model))
        self.output = config.run.output or self.demo_output

    @property
    def answers_folder(self) -> Path:
        """Where the parts and the record of the run are."""
        return self.output

    @abstractmethod
    def build(self) -> Build:
        """A function that loads a worker's answerer, called in the worker's process."""

    @abstractmethod
    def columns(self, result: ClipResult[Clip], attempts: Mapping[str, int]) -> Answered:
        """The output columns of all rows of a clip, whether it has answers or an error.

        Args:
            attempts: how often rows have been tried by earlier runs.
        """

    @abstractmethod
    def finish(self, run: Run) -> None:
        """Make what the job derives from the answers once all are there, such as a report."""

    @abstractmethod
    def summarize(self, run: Run) -> Summary:
        """The summary of the manifest's rows for `run.json`; `failed` counts those without a result."""

    @abstractmethod
    def report(self, run: Run, state: str, summary: Summary) -> None:
        """Print the summary and where the results are."""


@dataclass
class Run:
    """One run of a job in its folder. It answers what the plan lists, keeps count, and tells its listeners.

    Attributes:
        counts: brought up to date with every clip, also when the run ends early.
    """

    job: Job
    folder: OutputFolder
    manifest: Manifest
    plan: WorkPlan
    listeners: list[Listener] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def answer(self) -> None:
        """Answer the clips of the plan and write a part for each shard that is complete."""
        # Shards are fixed in the plan, so that the writer knows when one has all of its clips.
        writer = ShardWriter(self.folder, self.manifest, self.plan.shard_sizes, self.job.schema)
        # Rows that can't be asked need no worker; they go through the same writer as the rest.
        for clip in self.plan.clips:
            if clip.problem is not None:
                self._take(ClipResult(clip=clip, attempt=1, error=clip.problem), writer)
        # Without any clip to decode no cluster is started and no model loaded.
        clips = [clip for clip in self.plan.clips if clip.problem is None]
        if not clips:
            return
        progress = Progress(
            len(self.manifest.rows),
            initial=self.plan.finished + self.counts.rows,
            errors=self.counts.errors,
            interval=self.job.config.run.progress_interval,
        )
        # The bar comes after these rows, and counts them as done already.
        self.listeners.append(progress)
        began = time.monotonic()
        engine = Engine[Clip](self.job.build(), self.engine_config, on_worker_lost=self._lose_worker)
        try:
            # Interrupts come between two results only, so that no result is half written.
            with engine, ticking(self.emit, progress.close) as tick:
                for result in engine.run(clips, tick):
                    self._take(result, writer)
                    self.counts.seconds = time.monotonic() - began
        finally:
            self.counts.seconds = time.monotonic() - began
            self.listeners.remove(progress)
            # Also after an interrupt or error: rows of incomplete shards are not answered twice.
            writer.flush()

    def answer_alone(self, build: Build, clips: Sequence[Clip]) -> Iterator[ClipResult[Clip]]:
        """The results of these clips from a single worker with nothing decoded beside it, for measurements."""
        progress = Progress(len(clips), interval=self.job.config.run.progress_interval, unit="clip")
        # One worker and nothing decoded ahead: times are those of the model alone on the machine.
        alone = dataclasses.replace(self.engine_config, workers=1, decode_ahead=0)
        with Engine[Clip](build, alone) as engine, ticking(progress, progress.close) as tick:
            for result in engine.run(clips, tick):
                progress.add(1, result.error is not None)
                yield result

    @property
    def engine_config(self) -> EngineConfig:
        run: RunConfig = self.job.config.run
        return EngineConfig(
            workers=run.workers,
            gpus_per_worker=run.gpus_per_worker,
            decode_ahead=run.decode_ahead,
            decode_timeout=self.job.config.frames.decode_timeout,
        )

    def emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def _take(self, result: ClipResult[Clip], writer: ShardWriter) -> None:
        # (row, its columns) for every row of the clip; the writer returns a part if the shard is complete
        rows = self.job.columns(result, self.plan.attempts)
        part = writer.add(result.clip, rows)
        # A sweep has several output rows for each question: it failed if one of them did.
        errors = len({row.sample_id for row, columns in rows if columns["status"] == "error"})
        self.counts.videos += result.clip.problem is None
        self.counts.rows += len(result.clip.rows)
        self.counts.errors += errors
        self.emit(ClipDone(len(result.clip.rows), errors))
        if part is not None:
            self.emit(PartWritten(*part))

    def _lose_worker(self, reason: str, clips: int) -> None:
        self.counts.workers_lost += 1
        self.emit(WorkerLost(reason, clips))


@contextmanager
def ticking(emit: Listener, close: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yields what the engine calls while it runs: it emits `Tick`, and interrupts come there and nowhere else.

    Args:
        close: called at the end, also after an interrupt.
    """
    with deferred_interrupts() as check_interrupt:

        def tick() -> None:
            check_interrupt()
            emit(Tick())

        try:
            yield tick
        finally:
            close()


def run_job(job: Job) -> int:
    """Do what is missing in the job's folder; returns the exit code.

    0: every row has a result, and at most `max_error_rate` of them an error. 2: more errors. 130: interrupted.

    Raises:
        ConfigError: a setting, the manifest, the model or the folder is wrong.
    """
    from pipeline.model.load import model_revision  # with torch, which --help can do without

    config = job.config
    # The folder is locked for this process until the block ends.
    with open_output(job.answers_folder) as folder:
        manifest = read_manifest(job)
        # A model name can change its weights; the commit or content hash can't.
        revision = model_revision(config.model.model, config.model.revision)
        identity = fingerprint(config, revision, manifest.extras.schema)
        # Cleared before it is claimed, so that results of other settings are no obstacle.
        if config.run.overwrite:
            folder.clear()
        folder.claim(identity)
        plan = make_plan(manifest, folder, shard_size=config.run.shard_size, retry_errors=config.run.retry_errors)
        run = Run(job, folder, manifest, plan)
        with RunRecord(folder, config, identity, rows=len(manifest.rows), done=plan.finished) as record:
            run.listeners.append(record)
            try:
                # Answers first; `finish` makes what it makes (costs, report) out of the whole folder.
                run.answer()
                job.finish(run)
                record.state = "finished"
            except KeyboardInterrupt as interrupt:
                record.state = "interrupted"
                print(f"interrupted ({interrupt}); the same command goes on from here", file=sys.stderr)
            finally:
                # Also after a failure: `run.json` tells how far the run came.
                summary = job.summarize(run)
                record.closing = {"this_run": dataclasses.asdict(run.counts), "summary": summary}
        job.report(run, record.state, summary)
    if record.state == "interrupted":
        return INTERRUPTED
    # `failed` counts rows without a result, lost ones among them, so nothing missing exits with 0.
    return TOO_MANY_ERRORS if summary["failed"] > config.run.max_error_rate * len(manifest.rows) else 0


def resolve_answers(answer: AnswerConfig, model: ModelConfig) -> AnswerConfig:
    """The settings of the answers with prompt files read and `choice_scoring="auto"` replaced by the checkpoint's own.

    Raises:
        ConfigError: a file that can't be read, or no such model.
    """
    from pipeline.model.load import default_scoring  # with torch, which --help can do without

    # Read now, so that the fingerprint has the text of a prompt and not the name of its file.
    scoring = answer.choice_scoring
    return dataclasses.replace(
        answer,
        prompt=read_text("prompt", answer.prompt),
        system=None if answer.system is None else read_text("system", answer.system),
        choice_scoring=default_scoring(model.model, model.revision) if scoring == "auto" else scoring,
    )


def read_manifest(job: Job) -> Manifest:
    """The questions that a job is about; says on stderr what was changed in them, and which can't be asked.

    Raises:
        ConfigError: see `load_manifest`; or a template that can't be used or names another column.
    """
    settings = job.config.input
    templates = [template for template in message_templates(job.config.answer) if template is not None]
    manifest = load_manifest(
        settings.manifest or rendered_demo(job.output / "videos", job.demo_clips, job.config.model.model),
        reserved=job.schema.names,
        limit=settings.limit,
        bad_rows=settings.bad_rows,
    )
    # A template that names a missing column fails here, before anything is started.
    for template in templates:
        template.check(manifest.columns)
    total = len(manifest.rows)
    if labelled := sum(row.options_labelled for row in manifest.rows):
        changed = f'{labelled} of {total} rows have options with labels such as "A. "'
        print(f"{changed}; they are taken away (column options_labelled)", file=sys.stderr)
    if problems := manifest.problems:
        changed = f"{len(problems)} of {total} rows can't be asked and become rows with an error"
        print(f"{changed} (--bad-rows), such as: {problems[0].message}", file=sys.stderr)
    # Only columns that a prompt uses travel to the workers; all others stay with the driver.
    used = frozenset().union(*(template.names for template in templates))
    return manifest.with_carried(manifest.columns if ROW in used else used)


def rows_of_manifest(manifest: Manifest, table: pa.Table) -> pa.Table:
    """The rows of a folder's table whose `sample_id` the manifest has; a folder may hold more."""
    ids = {row.sample_id for row in manifest.rows}
    return table.filter(pa.array([name in ids for name in table["sample_id"].to_pylist()], pa.bool_()))


def rendered_demo(folder: Path, clips: int, model: str) -> str:
    """The manifest of rendered videos, which are made once: of long scenes for the embedded model that knows them."""
    from pipeline.embedded import demo
    from pipeline.embedded.long import demo as long_demo

    write = long_demo.write_dataset if model == "embedded-long" else demo.write_dataset
    return str(demo.render_demo(folder, clips, write))
