"""Numbers as people say them."""

from __future__ import annotations

from collections.abc import Sequence

PERCENT = "\N{NO-BREAK SPACE}%"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}{PERCENT}"


def share(ratio: float) -> str:
    """A keep ratio: `2.5 %`, `10 %`."""
    return f"{100 * ratio:g}{PERCENT}"


def unbroken(text: str) -> str:
    """Text that stays on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def gain(difference: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(number: int, noun: str) -> str:
    """`1 clip`, `1,036 clips`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def chance(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mebibytes(size: float) -> str:
    mib = size / 2**20
    return f"{mib:,.0f} MiB" if mib >= 10 else f"{mib:.2f} MiB"
