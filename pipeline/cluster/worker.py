"""A worker: the Ray actor that holds one model, and the decode tasks that feed it."""

import asyncio
import functools
import itertools
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster.failures import loss_reason
from pipeline.errors import RowError

DECODE_CRASHED = "decode_crashed"

P = ParamSpec("P")
T = TypeVar("T")


class Answerer(Protocol):
    """A loaded model with the decoder that suits it, as a worker holds it.

    Clips come in with `add`; `step` is called as long as it is `busy`. It runs in one thread.
    """

    @property
    def decode(self) -> Callable[..., object]:
        """Makes frames of a clip; picklable, since it runs in another process. A `RowError` is the clip's error.

        It is called with `again=True` when the process of a first try was lost.
        """

    @property
    def rows_in_flight(self) -> int:
        """Rows of clips that it can work on at the same time."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""

    @property
    def has_room(self) -> bool:
        """Whether another clip would be worked on soon."""

    def add(self, ticket: int, clip: Any, video: Any) -> None:
        """Take in a clip with its frames."""

    def step(self) -> Sequence[tuple[int, object]]:
        """Do the next piece of work; returns the clips that it finished, as (ticket, result).

        A result is picklable and small; a `RowError` is the clip's error. `SystemExit` ends the worker, for when the
        process can't answer any more. After any other exception `clear` is called.
        """

    def clear(self) -> None:
        """Forget all clips that are not finished."""


class OneByOne(ABC):
    """An `Answerer` that works on one clip at a time."""

    rows_in_flight = 1

    def __init__(self) -> None:
        self._clips: deque[tuple[int, object, object]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._clips)

    @property
    def has_room(self) -> bool:
        return not self._clips

    def add(self, ticket: int, clip: Any, video: Any) -> None:
        self._clips.append((ticket, clip, video))

    def step(self) -> Sequence[tuple[int, object]]:
        ticket, clip, video = self._clips[0]
        # The clip leaves the queue after the answer: if that raises, `clear` forgets it with all others.
        try:
            result = self.answer(clip, video)
        except RowError as error:
            result = error
        self._clips.popleft()
        return [(ticket, result)]

    def clear(self) -> None:
        self._clips.clear()

    @abstractmethod
    def answer(self, clip: Any, video: Any) -> object:
        """The result for a clip, picklable and small. A raised `RowError` is the clip's error."""


Build = Callable[[int], Answerer]
"""Loads a model for a worker that may use so many CPU threads."""


class WorkerExit(Exception):
    """The worker's process can't answer any more, because something in it raised SystemExit."""


@dataclass(eq=False)
class _Decoded:
    """A clip that waits for the model, and who waits for its result."""

    clip: object
    video: object
    result: asyncio.Future[object]


class Worker:
    """One model. Calls to `answer` decode side by side; the model takes what is decoded from an inbox."""

    def __init__(self, build: Build, decode_timeout: float) -> None:
        self.build = build
        self.decode_timeout = decode_timeout
        # One thread for the model, so that the event loop stays free to receive decoded clips.
        self.model_thread = ThreadPoolExecutor(max_workers=1)
        self.exit_reason: str | None = None
        # inbox: decoded, the model has no room yet; taken: in the model, by ticket
        self.inbox: deque[_Decoded] = deque()
        self.taken: dict[int, _Decoded] = {}
        self.tickets = itertools.count()
        self.wake = asyncio.Event()

    async def load(self, threads: int) -> int:
        """Load the model; returns how many rows of clips it works on at the same time."""
        self.answerer = await self._in_model_thread(self.build, min(threads, os.cpu_count() or 1))
        self.serving = asyncio.create_task(self._serve())
        return self.answerer.rows_in_flight

    async def answer(self, clip: object) -> object:
        """The clip's answers, or a `RowError`."""
        try:
            video = await self._decode(clip)
        except RowError as error:
            return error
        # The call returns when the model's loop sets the result; meanwhile other calls decode.
        waiting = _Decoded(clip, video, asyncio.get_running_loop().create_future())
        self.inbox.append(waiting)
        self.wake.set()
        return await waiting.result

    async def _serve(self) -> None:
        """Give the model what is decoded, and hand out what it has finished, for as long as the process lives."""
        while True:
            while self.inbox and self.answerer.has_room:
                self._take(self.inbox.popleft())
            # `clear` before `wait`, and nothing awaited in between, so no clip can arrive unnoticed.
            if not self.answerer.busy:
                self.wake.clear()
                await self.wake.wait()
                continue
            if (failure := await self._step()) is not None:
                await self._retry_alone(failure)

    def _take(self, waiting: _Decoded) -> None:
        ticket = next(self.tickets)
        self.taken[ticket] = waiting
        self.answerer.add(ticket, waiting.clip, waiting.video)

    async def _step(self) -> BaseException | None:
        """One step of the model; returns what it raised."""
        step = self._in_model_thread(self.answerer.step)
        # `gather` hands an exception back as a value; SystemExit has become WorkerExit in `_call`.
        (outcome,) = await asyncio.gather(step, return_exceptions=True)
        if isinstance(outcome, BaseException):
            return outcome
        for ticket, result in outcome:
            self.taken.pop(ticket).result.set_result(result)
        return None

    async def _retry_alone(self, failure: BaseException) -> None:
        """Answer each clip in flight anew, alone, after an exception that could be the fault of any of them."""
        unfinished = deque(self.taken.values())
        # With one clip in flight the culprit is known, and a second try would only fail again.
        single = len(unfinished) == 1
        self._forget()
        while unfinished and not isinstance(failure, WorkerExit):
            waiting = unfinished.popleft()
            raised = failure if single else await self._answer_alone(waiting)
            if raised is not None:
                self._forget()
                waiting.result.set_exception(raised)
                failure = raised
        for waiting in unfinished:  # the process can't answer any more
            waiting.result.set_exception(failure)

    async def _answer_alone(self, waiting: _Decoded) -> BaseException | None:
        """Steps until a clip is finished; returns what one of them raised."""
        self._take(waiting)
        while self.taken:
            if (failure := await self._step()) is not None:
                return failure
        return None

    def _forget(self) -> None:
        self.taken.clear()
        self.answerer.clear()

    async def _in_model_thread(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        call = functools.partial(self._call, function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self.model_thread, call)

    def _call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Calls the function unless SystemExit has been raised before; in the event loop it would stall all calls."""
        if self.exit_reason is None:
            try:
                return function(*arguments, **named)
            except SystemExit as exit:
                self.exit_reason = f"the worker exited: {exit}"
        raise WorkerExit(self.exit_reason)

    async def _decode(self, clip: object) -> object:
        try:
            return await self._decode_once(clip, again=False)
        # Only a lost process is tried again; what the decoder itself says of the file is final.
        except RowError as error:
            if error.error_type != DECODE_CRASHED:
                raise
        return await self._decode_once(clip, again=True)

    async def _decode_once(self, clip: object, *, again: bool) -> object:
        """Frames from a decode task, whose first item says that it has begun: from then on it has its seconds."""
        items = _decode_task.remote(self.answerer.decode, clip, again)
        # Waiting for a free CPU doesn't count: the clock starts with the task's first item.
        try:
            await _next_item(items)
            video = await asyncio.wait_for(_next_item(items), self.decode_timeout)
        except RayTaskError:  # first, as it is also what it was caused by, such as a TimeoutError
            raise
        except TimeoutError:
            # By force: a decoder that hangs in native code hears no signal.
            ray.cancel(items, force=True)
            message = f"not decoded within {self.decode_timeout:g} seconds (--decode-timeout)"
            raise RowError("decode_timeout", message) from None
        except RayError as loss:
            raise RowError(DECODE_CRASHED, f"the decoding process was lost, twice: {loss_reason(loss)}") from loss
        if isinstance(video, RowError):
            raise video
        return video


WorkerActor: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(Worker)


async def _next_item(items: ray.ObjectRefGenerator) -> object:
    return await (await anext(items))


@ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")
def _decode_task(decode: Callable[..., object], clip: object, again: bool) -> Iterator[object]:
    """None when the task begins, then the frames or a `RowError`."""
    yield None
    try:
        yield decode(clip, again=again)
    except RowError as error:
        yield error
