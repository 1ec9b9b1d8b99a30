"""Clips through decoders and models on a Ray cluster; the only file that imports Ray.

Each worker is an actor that holds one model. The driver keeps a few clips in flight at every worker; a worker has each
of them decoded at once, in a task of its own, and answers them one after the other. So frames go from the decoder's
process to the model's through the object store, and the driver sees clips and answers only.

What can go wrong, and what it costs:

- a decode that hangs is killed at its deadline, one that crashes is tried once more: an error for that clip;
- an exception in a decode or an answer: an error for that clip;
- a worker that dies is replaced. The clips that were in flight there run again, each alone on a worker, so that one
  that dies with a second worker is the one to blame: an error for that clip;
- a model that can't be loaded: `ConfigError`, the job ends.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.errors import ConfigError, RowError

logger = logging.getLogger(__name__)

ClipT = TypeVar("ClipT")
MAX_DEATHS = 2
"""A clip that was in flight when this many workers died is given up."""
MAX_LOAD_FAILURES = 3
"""When this many loads fail in a row, the model can't be loaded."""
HOPELESS = 5
"""When this many clips have been given up before any was answered, the fault is not the clips'."""
DECODE_CRASHED = "decode_crashed"
TICK_SECONDS = 0.5


class Answerer(Protocol):
    """A loaded model with the decoder that suits it, as a worker holds it."""

    @property
    def decode(self) -> Callable[[Any], Any]:
        """Makes frames of a clip; picklable, since it runs in another process. A `RowError` is the clip's error."""

    def answer(self, clip: Any, video: Any) -> Any:
        """What the clip's frames say, picklable and small.

        A `RowError` is the clip's error; `SystemExit` ends the worker, for when the process can't answer any more.
        """


Build = Callable[[int], Answerer]
"""Loads a model for a worker that may use so many CPU threads."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the work is spread.

    Attributes:
        workers: models loaded at once. None: one per GPU of the cluster, or one when it has none.
        gpus_per_worker: None: 1 when the cluster has GPUs, else 0.
        decode_ahead: clips that a worker has decoded beside the one it answers.
        decode_timeout: seconds from the start of a decode until its process is killed.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    decode_ahead: int = 2
    decode_timeout: float = 120.0


@dataclass(frozen=True, kw_only=True)
class ClipResult(Generic[ClipT]):
    """What became of a clip: `answers` as the answerer returned them, or an `error`."""

    clip: ClipT
    attempt: int
    answers: Any = None
    error: RowError | None = None


@dataclass(frozen=True)
class Resources:
    """What each worker gets, settled once the cluster is known."""

    workers: int
    gpus: float
    threads: int


@dataclass(eq=False)
class _Job(Generic[ClipT]):
    """A clip on its way, and how many workers died while it was in flight."""

    clip: ClipT
    deaths: int = 0


@dataclass(eq=False)
class _Hand(Generic[ClipT]):
    """The driver's side of a worker."""

    actor: Any
    loading: Any
    jobs: dict[Any, _Job[ClipT]] = field(default_factory=dict)

    def has_room(self, job: _Job[ClipT], window: int) -> bool:
        """Whether the worker can take the job now: a suspect only alone."""
        if self.loading is not None:
            return False
        alone = job.deaths > 0 or any(other.deaths for other in self.jobs.values())
        return len(self.jobs) < (1 if alone else window)


class Engine(Generic[ClipT]):
    """Workers on a Ray cluster, from entry into the context until its exit.

    The cluster is the one that RAY_ADDRESS names; without it, one is started on this machine for the time being.
    """

    def __init__(self, build: Build, config: EngineConfig) -> None:
        """
        Args:
            build: loads the model; called in each worker's process, so it is pickled.
        """
        self.build = build
        self.config = config
        self.answered = 0
        self.given_up = 0
        self._hands: list[_Hand[ClipT]] = []
        self._loaded = 0
        self._load_failures = 0
        self._bugs: set[str] = set()
        self._owns_ray = False

    def __enter__(self) -> Self:
        self._owns_ray = _connect()
        self.resources = _settle(self.config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hand in self._hands:
            ray.kill(hand.actor)
        self._hands.clear()
        if self._owns_ray:
            ray.shutdown()

    def run(self, clips: Iterable[ClipT], tick: Callable[[], None] = lambda: None) -> Iterator[ClipResult[ClipT]]:
        """Yields each clip's result, in the order in which they come to be.

        Args:
            tick: called at least every `TICK_SECONDS` seconds; what it raises ends the run.

        Raises:
            ConfigError: no worker can load the model, or every clip kills its worker.
        """
        fresh = deque(_Job(clip) for clip in clips)
        suspects: deque[_Job[ClipT]] = deque()
        while fresh or suspects or self._in_flight():
            self._hire(len(fresh) + len(suspects) + self._in_flight())
            self._give_out(suspects)
            self._give_out(fresh)
            tick()
            for ref in self._wait():
                hand = next((hand for hand in self._hands if ref is hand.loading or ref in hand.jobs), None)
                if hand is None:  # its worker died in this very round
                    continue
                if ref is hand.loading:
                    self._finish_loading(hand)
                    continue
                try:
                    answers = ray.get(ref)
                except RayTaskError as failure:
                    if isinstance(failure.cause, WorkerExit):
                        yield from self._bury(hand, str(failure.cause), suspects)
                    else:
                        yield self._result(hand.jobs.pop(ref), self._internal_error(failure))
                except RayError as death:
                    yield from self._bury(hand, _reason(death), suspects)
                else:
                    yield self._result(hand.jobs.pop(ref), answers)

    def _in_flight(self) -> int:
        return sum(len(hand.jobs) for hand in self._hands)

    def _hire(self, clips_left: int) -> None:
        """Starts workers up to the number that is wanted and has something to do."""
        for _ in range(min(self.resources.workers, clips_left) - len(self._hands)):
            actor = _WorkerActor.options(num_gpus=self.resources.gpus).remote(self.build, self.config.decode_timeout)
            self._hands.append(_Hand(actor, actor.load.remote(self.resources.threads)))

    def _give_out(self, queue: deque[_Job[ClipT]]) -> None:
        """Hands jobs to the workers that have room, the idlest first."""
        while queue:
            window = 1 + self.config.decode_ahead
            open_hands = [hand for hand in self._hands if hand.has_room(queue[0], window)]
            if not open_hands:
                return
            hand = min(open_hands, key=lambda hand: len(hand.jobs))
            job = queue.popleft()
            hand.jobs[hand.actor.answer.remote(job.clip)] = job

    def _wait(self) -> list[Any]:
        """The references that are ready, after one tick at most."""
        refs = [ref for hand in self._hands for ref in (hand.loading, *hand.jobs) if ref is not None]
        ready, _ = ray.wait(refs, num_returns=1, timeout=TICK_SECONDS, fetch_local=False)
        return ready

    def _finish_loading(self, hand: _Hand[ClipT]) -> None:
        """Lets a worker whose model is loaded join in; tries anew where a model has been loaded before."""
        try:
            ray.get(hand.loading)
        except RayTaskError as failure:
            if not self._loaded:
                raise _load_error(failure) from failure
            self._fail_loading(hand, _load_error(failure))
        except RayError as death:
            self._fail_loading(hand, ConfigError(f"workers die while they load the model: {_reason(death)}"))
        else:
            hand.loading = None
            self._loaded += 1
            self._load_failures = 0

    def _fail_loading(self, hand: _Hand[ClipT], error: ConfigError) -> None:
        ray.kill(hand.actor)
        self._hands.remove(hand)
        self._load_failures += 1
        logger.warning("%s", error)
        if self._load_failures >= MAX_LOAD_FAILURES:
            raise error

    def _internal_error(self, failure: RayTaskError) -> RowError:
        """The error of a clip on which the program itself failed; the first traceback of a kind goes to the log."""
        summary = _summary(failure)
        if summary not in self._bugs:
            self._bugs.add(summary)
            logger.error("the program failed on a clip: %s", failure)
        return RowError("internal_error", summary)

    def _bury(self, hand: _Hand[ClipT], reason: str, suspects: deque[_Job[ClipT]]) -> Iterator[ClipResult[ClipT]]:
        """Takes a dead worker off the list; its clips become suspects, or are given up."""
        ray.kill(hand.actor)  # one that gave up, or can't be reached, may still run
        self._hands.remove(hand)
        logger.warning("a worker died with %d clips in flight: %s", len(hand.jobs), reason)
        for job in hand.jobs.values():
            job.deaths += 1
            if job.deaths < MAX_DEATHS:
                suspects.append(job)
            else:
                message = f"{job.deaths} workers died with this clip in flight, the last one so: {reason}"
                yield self._give_up(job, RowError("worker_died", message))

    def _give_up(self, job: _Job[ClipT], error: RowError) -> ClipResult[ClipT]:
        self.given_up += 1
        if not self.answered and self.given_up >= HOPELESS:
            raise ConfigError(f"no clip has been answered, and {self.given_up} were given up: {error.message}")
        return ClipResult(clip=job.clip, attempt=job.deaths, error=error)

    def _result(self, job: _Job[ClipT], answers: Any) -> ClipResult[ClipT]:
        if isinstance(answers, RowError):
            return ClipResult(clip=job.clip, attempt=job.deaths + 1, error=answers)
        self.answered += 1
        return ClipResult(clip=job.clip, attempt=job.deaths + 1, answers=answers)


class WorkerExit(Exception):
    """What ended a worker from within."""


class _Worker:
    """One model. Calls to `answer` decode side by side and take turns at the model."""

    def __init__(self, build: Build, decode_timeout: float) -> None:
        self.build = build
        self.decode_timeout = decode_timeout
        self.model_thread = ThreadPoolExecutor(max_workers=1)
        self.exit_reason: str | None = None

    async def load(self, threads: int) -> None:
        self.answerer = await self._in_model_thread(self.build, min(threads, os.cpu_count() or 1))

    async def answer(self, clip: Any) -> Any:
        """The clip's answers, or a `RowError`."""
        try:
            video = await self._decode(clip)
            return await self._in_model_thread(self.answerer.answer, clip, video)
        except RowError as error:
            return error

    async def _in_model_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.model_thread, self._call, function, *arguments)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the function unless SystemExit has been raised before; in the event loop it would stall all calls."""
        if self.exit_reason is None:
            try:
                return function(*arguments)
            except SystemExit as exit:
                self.exit_reason = f"the worker exited: {exit}"
        raise WorkerExit(self.exit_reason)

    async def _decode(self, clip: Any) -> Any:
        try:
            return await self._decode_once(clip)
        except RowError as error:
            if error.error_type != DECODE_CRASHED:
                raise
        return await self._decode_once(clip)

    async def _decode_once(self, clip: Any) -> Any:
        """Frames from a decode task, whose first item says that it has begun: from then on it has its seconds."""
        items = _decode_task.remote(self.answerer.decode, clip)
        try:
            await _next_item(items)
            video = await asyncio.wait_for(_next_item(items), self.decode_timeout)
        except RayTaskError:  # first, as it is also what it was caused by, such as a TimeoutError
            raise
        except TimeoutError:
            ray.cancel(items, force=True)
            message = f"not decoded within {self.decode_timeout:g} seconds (--decode-timeout)"
            raise RowError("decode_timeout", message) from None
        except RayError as loss:
            raise RowError(DECODE_CRASHED, f"the decoding process was lost, twice: {_reason(loss)}") from loss
        if isinstance(video, RowError):
            raise video
        return video


_WorkerActor: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(_Worker)


async def _next_item(items: Any) -> Any:
    return await (await anext(items))


@ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")
def _decode_task(decode: Callable[[Any], Any], clip: Any) -> Iterator[Any]:
    """None when the task begins, then the frames or a `RowError`."""
    yield None
    try:
        yield decode(clip)
    except RowError as error:
        yield error


def _connect() -> bool:
    """Joins the cluster, or starts one on this machine; returns whether it has to be left again."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Ray's own choice is 15, with which the model stands still whenever the machine has something else to do.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init("local", include_dashboard=False, **quiet)
        return True
    try:
        _knock(address)
        ray.init(address, **quiet)
    except (OSError, ValueError) as error:
        raise ConfigError(f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there: {error}") from error
    return True


def _knock(address: str) -> None:
    """Raises OSError when nothing listens at a HOST:PORT; Ray itself would try again for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _settle(config: EngineConfig) -> Resources:
    """What the workers get of this cluster.

    Raises:
        ConfigError: the cluster has less than is asked for.
    """
    cluster = ray.cluster_resources()
    gpus, cpus = cluster.get("GPU", 0.0), int(cluster.get("CPU", 0))
    each = config.gpus_per_worker
    if each is None:
        each = 1.0 if gpus else 0.0
    workers = config.workers or (max(1, int(gpus / each)) if each else 1)
    if workers * each > gpus:
        raise ConfigError(f"{workers} workers with {each:g} GPUs each need more than the {gpus:g} GPUs of this cluster")
    if not cpus:
        raise ConfigError("this cluster has no CPUs, and decoding needs one; start a node with --num-cpus")
    return Resources(workers, each, max(1, cpus // workers))


def _load_error(failure: RayTaskError) -> ConfigError:
    cause = failure.cause
    return cause if isinstance(cause, ConfigError) else ConfigError(f"the model can't be loaded: {_summary(failure)}")


def _summary(failure: RayTaskError) -> str:
    """The exception at the bottom of a remote call, in one line."""
    cause = failure.cause
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return " ".join(f"{type(cause).__name__}: {cause}".split())


def _reason(loss: RayError) -> str:
    """Why Ray gave something up, in one line and without its advice."""
    text = " ".join(str(loss).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    return detail.partition(" Some common causes")[0]
