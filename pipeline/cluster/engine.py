"""Clips through decoders and models on a Ray cluster, seen from the driver.

The driver keeps a few clips in flight at every worker; a worker has each of them decoded at once, in a task of its own,
and answers them one after the other. So frames go from the decoder's process to the model's through the object store,
and the driver sees clips and answers only.

What can go wrong, and what it costs:

- a decode that hangs is killed at its deadline, one that crashes is tried once more: an error for that clip;
- an exception in a decode or an answer: an error for that clip;
- a worker that dies is replaced. The clips that were in flight there run again, each alone on a worker, so that one
  that dies with a second worker is the one to blame: an error for that clip;
- a model that can't be loaded: `ConfigError`, the job ends.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster.connect import EngineConfig, connect, worker_resources
from pipeline.cluster.failures import load_error, loss_reason, root_cause
from pipeline.cluster.worker import Build, WorkerActor, WorkerExit
from pipeline.errors import ConfigError, RowError

logger = logging.getLogger(__name__)

ClipT = TypeVar("ClipT")
MAX_DEATHS = 2
"""A clip that was in flight when this many workers died is given up."""
MAX_LOAD_FAILURES = 3
"""When this many loads fail in a row, the model can't be loaded."""
MAX_GIVEN_UP_UNANSWERED = 5
"""When this many clips have been given up before any was answered, the fault is not the clips'."""
TICK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class ClipResult(Generic[ClipT]):
    """The result of a clip: `answers` as the answerer returned them, or an `error`."""

    clip: ClipT
    attempt: int
    answers: Any = None
    error: RowError | None = None


@dataclass(eq=False)
class _Job(Generic[ClipT]):
    """A clip that is to be answered, and how many workers died while it was in flight."""

    clip: ClipT
    deaths: int = 0

    @property
    def rows(self) -> int:
        """Questions of the clip."""
        return len(getattr(self.clip, "rows", ())) or 1


@dataclass(eq=False)
class _WorkerHandle(Generic[ClipT]):
    """The driver's side of a worker."""

    actor: ActorHandle
    loading: ray.ObjectRef | None
    rows: int = 1
    """Rows of clips that its model works on at the same time."""
    jobs: dict[ray.ObjectRef, _Job[ClipT]] = field(default_factory=dict)

    def has_room(self, job: _Job[ClipT], ahead: int) -> bool:
        """Whether the worker can take the job now: one that lost a worker before only alone.

        Args:
            ahead: clips to be decoded beside those that the model works on.
        """
        if self.loading is not None:
            return False
        # Alone, so that the next death can only be the fault of this clip.
        if job.deaths > 0 or any(other.deaths for other in self.jobs.values()):
            return not self.jobs
        # The clips that the model has no room for yet are those decoded ahead.
        before = [0, *itertools.accumulate(other.rows for other in self.jobs.values())]  # rows ahead of each clip
        decoded_ahead = sum(rows >= self.rows for rows in before)  # this one, if it were taken, among them
        return decoded_ahead <= ahead


class Engine(Generic[ClipT]):
    """Workers on a Ray cluster, from entry into the context until its exit.

    The cluster is the one that RAY_ADDRESS names; without it, one is started on this machine for the time being.
    """

    def __init__(
        self,
        build: Build,
        config: EngineConfig,
        *,
        on_worker_lost: Callable[[str, int], None] = lambda reason, clips: None,
    ) -> None:
        """
        Args:
            build: loads the model; called in each worker's process, so it is pickled.
            on_worker_lost: called with the reason and the number of clips in flight when a worker has died.
        """
        self.build = build
        self.config = config
        self.on_worker_lost = on_worker_lost
        self.answered = 0
        self.given_up = 0
        self._handles: list[_WorkerHandle[ClipT]] = []
        self._loaded = 0
        self._load_failures = 0
        self._bugs: set[str] = set()
        self._owns_ray = False

    def __enter__(self) -> Self:
        # A cluster that was there before (RAY_ADDRESS, a test session) is left running at the end.
        self._owns_ray = connect()
        self.resources = worker_resources(self.config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Workers go first: on a shared cluster they would live on and hold its GPUs.
        for handle in self._handles:
            ray.kill(handle.actor)
        self._handles.clear()
        if self._owns_ray:
            ray.shutdown()

    def run(self, clips: Iterable[ClipT], tick: Callable[[], None] = lambda: None) -> Iterator[ClipResult[ClipT]]:
        """Yields each clip's result, in the order in which the clips finish.

        Args:
            tick: called at least every `TICK_SECONDS` seconds; what it raises ends the run.

        Raises:
            ConfigError: no worker can load the model, or every clip kills its worker.
        """
        fresh = deque(_Job(clip) for clip in clips)
        retries: deque[_Job[ClipT]] = deque()
        # Each round starts workers, hands out what they have room for, and takes what has come back.
        while fresh or retries or self._in_flight():
            # Never more workers than clips: one beyond that would load a model for nothing.
            self._start_workers(len(fresh) + len(retries) + self._in_flight())
            # Retries first: each holds a worker to itself, better while others have work left.
            self._hand_out(retries)
            self._hand_out(fresh)
            tick()
            for ref in self._wait():
                handle = next((handle for handle in self._handles if ref is handle.loading or ref in handle.jobs), None)
                if handle is None:  # its worker died in this very round
                    continue
                # A worker is ready (or failed to load), or one of its clips has come back.
                if ref is handle.loading:
                    self._finish_loading(handle)
                    continue
                # Small answers, so fetching blocks for no time worth mentioning; frames never come to the driver.
                try:
                    answers = ray.get(ref)
                except RayTaskError as failure:
                    # The process can't answer any more, a bug costs this one clip, a lost process costs all in flight.
                    if isinstance(failure.cause, WorkerExit):
                        yield from self._retire(handle, str(failure.cause), retries)
                    else:
                        yield self._result(handle.jobs.pop(ref), self._internal_error(failure))
                except RayError as death:
                    yield from self._retire(handle, loss_reason(death), retries)
                else:
                    yield self._result(handle.jobs.pop(ref), answers)

    def _in_flight(self) -> int:
        return sum(len(handle.jobs) for handle in self._handles)

    def _start_workers(self, clips_left: int) -> None:
        """Starts workers up to the number that is wanted and has something to do."""
        for _ in range(min(self.resources.workers, clips_left) - len(self._handles)):
            # Decoding takes whole CPUs in tasks of its own, so the actor reserves GPUs only.
            actor = WorkerActor.options(num_gpus=self.resources.gpus).remote(self.build, self.config.decode_timeout)
            self._handles.append(_WorkerHandle(actor, actor.load.remote(self.resources.threads)))

    def _hand_out(self, queue: deque[_Job[ClipT]]) -> None:
        """Hands jobs to the workers that have room, the idlest first."""
        while queue:
            ahead = self.config.decode_ahead
            with_room = [handle for handle in self._handles if handle.has_room(queue[0], ahead)]
            if not with_room:
                return
            # Whoever has fewest clips runs dry first.
            handle = min(with_room, key=lambda handle: len(handle.jobs))
            job = queue.popleft()
            handle.jobs[handle.actor.answer.remote(job.clip)] = job

    def _wait(self) -> list[ray.ObjectRef]:
        """The references that are ready, after one tick at most."""
        refs = [ref for handle in self._handles for ref in (handle.loading, *handle.jobs) if ref is not None]
        # `fetch_local=False`: it is enough that a result is there; `ray.get` fetches it when it is read.
        ready, _ = ray.wait(refs, num_returns=1, timeout=TICK_SECONDS, fetch_local=False)
        return ready

    def _finish_loading(self, handle: _WorkerHandle[ClipT]) -> None:
        """Marks a worker as ready, or retires it if its load failed; an error in the very first load ends the run."""
        try:
            handle.rows = ray.get(handle.loading)
        except RayTaskError as failure:
            # No model has ever loaded here: the settings are wrong, and another try would fail alike.
            if not self._loaded:
                raise load_error(failure) from failure
            self._fail_loading(handle, load_error(failure))
        except RayError as death:
            self._fail_loading(handle, ConfigError(f"workers die while they load the model: {loss_reason(death)}"))
        else:
            handle.loading = None
            self._loaded += 1
            self._load_failures = 0

    def _fail_loading(self, handle: _WorkerHandle[ClipT], error: ConfigError) -> None:
        ray.kill(handle.actor)
        self._handles.remove(handle)
        self._load_failures += 1
        logger.warning("%s", error)
        if self._load_failures >= MAX_LOAD_FAILURES:
            raise error

    def _internal_error(self, failure: RayTaskError) -> RowError:
        """The error of a clip on which the program itself failed; the first traceback of a kind goes to the log."""
        summary = root_cause(failure)
        if summary not in self._bugs:
            self._bugs.add(summary)
            logger.error("the program failed on a clip: %s", failure)
        return RowError("internal_error", summary)

    def _retire(
        self, handle: _WorkerHandle[ClipT], reason: str, retries: deque[_Job[ClipT]]
    ) -> Iterator[ClipResult[ClipT]]:
        """Takes a dead worker off the list; its clips are tried again, or given up."""
        ray.kill(handle.actor)  # one that gave up, or can't be reached, may still run
        self._handles.remove(handle)
        logger.warning("a worker died with %d clips in flight: %s", len(handle.jobs), reason)
        self.on_worker_lost(reason, len(handle.jobs))
        for job in handle.jobs.values():
            job.deaths += 1
            if job.deaths < MAX_DEATHS:
                retries.append(job)
            else:
                message = f"{job.deaths} workers died with this clip in flight, the last one so: {reason}"
                yield self._give_up(job, RowError("worker_died", message))

    def _give_up(self, job: _Job[ClipT], error: RowError) -> ClipResult[ClipT]:
        self.given_up += 1
        # When every clip dies and none is answered, the fault is the model's or the machine's.
        if not self.answered and self.given_up >= MAX_GIVEN_UP_UNANSWERED:
            raise ConfigError(f"no clip has been answered, and {self.given_up} were given up: {error.message}")
        return ClipResult(clip=job.clip, attempt=job.deaths, error=error)

    def _result(self, job: _Job[ClipT], answers: object) -> ClipResult[ClipT]:
        if isinstance(answers, RowError):
            return ClipResult(clip=job.clip, attempt=job.deaths + 1, error=answers)
        self.answered += 1
        return ClipResult(clip=job.clip, attempt=job.deaths + 1, answers=answers)
