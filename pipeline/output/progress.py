"""Progress of a job, as a bar in a terminal and as lines elsewhere; and interrupts that wait for a safe moment."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from pipeline.output.events import ClipDone, Event, Tick


class Progress:
    """Counts rows that are done and says so on `stream`; a listener of a run.

    Args:
        total: rows of the whole job.
        initial: rows that an earlier run has done.
        interval: seconds between lines where `stream` is no terminal.
        unit: what is counted, in the singular.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        interval: float = 5.0,
        errors: int = 0,
        unit: str = "row",
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.initial, self.done, self.errors = total, initial, initial, errors
        self.interval, self.unit, self.stream, self.clock = interval, unit, stream, clock
        self.started = self.printed = clock()
        self.timed_from: tuple[float, int] | None = None
        self.bar = tqdm(total=total, initial=initial, unit=unit, file=stream) if stream.isatty() else None

    def __call__(self, event: Event) -> None:
        match event:
            case ClipDone(rows, errors):
                self.add(rows, errors)
            case Tick():
                self.tick()

    def add(self, rows: int, errors: int) -> None:
        """Counts rows that have just been done, `errors` of them with an error."""
        self.done += rows
        # Rates count from the first result on: what came before it is mostly the loading of the model.
        self.timed_from = self.timed_from or (self.clock(), self.done)
        self.errors += errors
        if self.bar is not None:
            self.bar.set_postfix(errors=self.errors, refresh=False)
            self.bar.update(rows)

    def tick(self) -> None:
        """Redraw the bar, or print a line when `interval` has passed; to be called often."""
        if self.bar is not None:
            self.bar.refresh()
        elif self.clock() - self.printed >= self.interval:
            self._print_line()

    def close(self) -> None:
        """Close the bar, or print the final line."""
        if self.bar is not None:
            self.bar.close()
        else:
            self._print_line()

    def _print_line(self) -> None:
        self.printed = self.clock()
        print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """`[00:35] 120/400 rows (30 %), 3.4 rows/s, ETA 01:22, 2 errors`."""
        elapsed = _clock_time(self.clock() - self.started)
        share = 100 * self.done // max(1, self.total)
        text = f"[{elapsed}] {self.done}/{self.total} {self.unit}s ({share} %)"
        if self.timed_from is None:
            return f"{text}, no answers yet"
        # The first result itself is left out of the rate, as it starts the clock.
        began, done_then = self.timed_from
        if self.done == done_then:
            return f"{text}, {self.errors} errors"
        rate = (self.done - done_then) / max(self.clock() - began, 1e-9)
        left = _clock_time((self.total - self.done) / rate)
        return f"{text}, {two_digits(rate)} {self.unit}s/s, ETA {left}, {self.errors} errors"


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Within the context SIGINT and SIGTERM wait until the yielded function is called, which raises KeyboardInterrupt.

    So an interrupt never comes between two steps that belong together. A second signal acts at once.
    """
    # Handlers only note the signal; `check` raises where nothing can be torn apart.
    received: list[int] = []
    before: dict[int, object] = {}

    def remember(number: int, _frame: object) -> None:
        received.append(number)
        # The second signal has its usual effect, for a job that hangs.
        signal.signal(number, signal.SIG_DFL)

    def check() -> None:
        if received:
            raise KeyboardInterrupt(signal.Signals(received[0]).name)

    for name in (signal.SIGINT, signal.SIGTERM):
        before[name] = signal.signal(name, remember)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def two_digits(number: float) -> str:
    """A rate to be read by people: 0.034, 2.5, 540."""
    return f"{float(f'{number:.2g}'):g}"


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
