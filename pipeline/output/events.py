"""What happens in a run, for those who watch it: the progress line, the heartbeat in `run.json`, later metrics."""

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
    """Nothing special; comes at least every half a second while the engine runs."""


Event = ClipDone | WorkerLost | PartWritten | Tick
Listener = Callable[[Event], None]
