"""Progress speaks in time and says the right numbers; interrupts wait for their moment."""

import io
import os
import signal

import pytest

from pipeline.output.progress import Progress, deferred_interrupts


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_in_time_with_rate_and_eta() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(400, initial=100, interval=5, stream=stream, clock=clock)
    clock.now = 4
    progress.tick()
    assert stream.getvalue() == ""
    clock.now = 30
    progress.tick()
    progress.tick()
    assert stream.getvalue() == "[00:30] 100/400 rows (25 %), no answers yet\n"
    progress.add(10, errors=0)
    clock.now = 40
    progress.add(40, errors=3)
    progress.tick()
    assert stream.getvalue().splitlines()[1:] == ["[00:40] 150/400 rows (37 %), 4 rows/s, ETA 01:02, 3 errors"]
    progress.add(200, errors=0)
    assert "350/400 rows (87 %), 24 rows/s" in progress.line()
    clock.now = 30.5
    assert "480 rows/s" in progress.line()
    clock.now = 40 + 3600
    progress.close()
    assert stream.getvalue().splitlines()[-1].startswith("[1:00:40] 350/400 rows")


def test_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(4, stream=stream)
    progress.add(3, errors=1)
    progress.tick()
    progress.close()
    assert "3/4" in stream.getvalue()
    assert "errors=1" in stream.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_until_it_is_asked_for(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=number.name), deferred_interrupts() as check:
        check()
        os.kill(os.getpid(), number)
        steps = ["goes on"]
        check()
        steps.append("not reached")
    assert steps == ["goes on"]
    assert signal.getsignal(number) == before
