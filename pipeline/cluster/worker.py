"""A worker: the Ray actor that holds one model, and the decode tasks that feed it."""

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster.failures import loss_reason
from pipeline.errors import RowError

DECODE_CRASHED = "decode_crashed"


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


class WorkerExit(Exception):
    """What ended a worker from within."""


class Worker:
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
            raise RowError(DECODE_CRASHED, f"the decoding process was lost, twice: {loss_reason(loss)}") from loss
        if isinstance(video, RowError):
            raise video
        return video


WorkerActor: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(Worker)


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
