"""Events of a run, for its listeners: the progress line and the heartbeat in `run.json`."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ClipDone:
    """A clip has its results: `rows` questions, `errors` of them with an error."""

    rows: int
    errors: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker died with `clips` clips in flight."""

    reason: str
    clips: int


@dataclass(frozen=True)
class PartWritten:
    """A part of the output is there whole, with `rows` rows."""

    name: str
    rows: int


@dataclass(frozen=True)
class Tick:
    """Time has passed; comes at least every half a second while the engine runs."""


Event = ClipDone | WorkerLost | PartWritten | Tick
Listener = Callable[[Event], None]
