"""The tables of the report, as values, so that the page and `report.md` say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.sweep.cells import FULL
from pipeline.sweep.report.data import SUBJECT_TITLE, Comparison, Point, Record, Sweep
from pipeline.sweep.report.findings import LOSS, UNTESTED, WIN, PairedDifference, paired_differences, standings
from pipeline.sweep.report.words import chance, gain, mebibytes, percent, share, unbroken
from pipeline.sweep.statistics import SHOWN_DIFFERENCE

NONE = "–"
OUTCOMES = {WIN: "win", LOSS: "loss"}
MARKS = {WIN: "right", LOSS: "wrong"}
"""How the page colours a win and a loss."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table.

    Attributes:
        value: what the column is sorted by; None comes last.
        mark: CSS class.
        note: shown when the pointer rests on the cell.
    """

    text: str
    value: float | str | None = None
    mark: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table; its first entry names it.

    Attributes:
        method: which method it is about, for highlighting; None for rows about none.
        cell: name of the sweep's cell, where the row is about one.
    """

    entries: tuple[Entry, ...]
    method: str | None = None
    cell: str | None = None


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[Row, ...]


def accuracy_table(comparison: Comparison) -> Table:
    """Accuracy of every method at every keep ratio, mean over seeds; the best of each column is marked."""
    rows = []
    # What takes no keep ratio stands in every column.
    for point in [*([comparison.full] if comparison.full else []), *comparison.floors]:
        rows.append(Row((Entry(point.label), *[_accuracy_entry(point)] * len(comparison.ratios)), point.method))
    best = {
        ratio: max(filter(None, map(_mean_accuracy, comparison.at(ratio))), default=None) for ratio in comparison.ratios
    }
    for method in comparison.methods:
        by_ratio = {point.keep_ratio: point for point in comparison.of(method)}
        entries = [_accuracy_entry(by_ratio.get(ratio), best[ratio]) for ratio in comparison.ratios]
        rows.append(Row((Entry(method), *entries), method))
    return Table(("accuracy, %", *(share(ratio) for ratio in comparison.ratios)), tuple(rows))


def _mean_accuracy(point: Point) -> float | None:
    return point.mean("accuracy")


def _accuracy_entry(point: Point | None, best: float | None = None) -> Entry:
    accuracy = point.mean("accuracy") if point else None
    if point is None or accuracy is None:
        return Entry(NONE)
    low, high = point.mean("accuracy_low"), point.mean("accuracy_high")
    note = None if low is None or high is None else f"{point.title}: 95 % interval {100 * low:.1f} to {100 * high:.1f}"
    return Entry(f"{100 * accuracy:.1f}", accuracy, "best" if accuracy == best else None, note)


def standing_table(sweep: Sweep, comparison: Comparison) -> Table:
    """At each keep ratio, ViTCoP beside all tokens, random and the best other method."""
    rows = []
    for standing in standings(sweep, comparison):
        best = standing.best.rival if standing.best else None
        best_accuracy = best.mean("accuracy") if best else None
        entries = (
            Entry(share(standing.point.keep_ratio or 0)),
            Entry(percent(standing.point.mean("accuracy") or 0)),
            *(
                _difference_entry(each, in_words(each)) if each else Entry("")
                for each in (standing.full, standing.random, standing.best)
            ),
            Entry(f"{best.method} {percent(best_accuracy)}" if best and best_accuracy is not None else ""),
            Entry(f"{standing.place} of {standing.field}"),
        )
        rows.append(Row(entries))
    head = ("kept", SUBJECT_TITLE, "minus all tokens", "minus random", "minus best other", "best other", "place")
    return Table(head, tuple(rows))


def difference_table(sweep: Sweep, comparison: Comparison) -> Table:
    """ViTCoP minus every other method at every keep ratio, in points."""
    found = paired_differences(sweep, comparison)
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        entries = []
        for ratio in comparison.ratios:
            each = found.get((method, ratio))
            word = OUTCOMES.get(each.outcome, "") if each else ""
            entries.append(_difference_entry(each, f"{gain(each.difference)} {word}".rstrip()) if each else Entry(NONE))
        rows.append(Row((Entry(method), *entries), method))
    return Table(("minus", *(share(ratio) for ratio in comparison.ratios)), tuple(rows))


def _difference_entry(each: PairedDifference, text: str) -> Entry:
    return Entry(text, each.difference, MARKS.get(each.outcome), in_words(each))


def in_words(each: PairedDifference) -> str:
    """`-0.3 (not significant, p = 0.884; n = 1,480 would show 5 points)`."""
    if each.outcome == UNTESTED or each.p is None:
        return f"{gain(each.difference)} (untested)"
    p = unbroken(f"p {chance(each.p) if each.p < 0.001 else '= ' + chance(each.p)}")
    if each.outcome in OUTCOMES:
        return f"{gain(each.difference)} ({OUTCOMES[each.outcome]}, {p})"
    needed = unbroken(f"n = {each.needed:,}") + " would show " + unbroken(f"{100 * SHOWN_DIFFERENCE:g} points")
    return f"{gain(each.difference)} (not significant, {p}; {needed})"


Show = Callable[[Record], Entry]


def _number(column: str, text: Callable[[float], str]) -> Show:
    return lambda cell: Entry(NONE) if cell[column] is None else Entry(text(cell[column]), cell[column])


def _timed(column: str, text: Callable[[float], str], doubt: str = "cost_doubt") -> Show:
    """A cost with its quartiles over rounds; what can't be relied on is marked, and sorted last."""

    def show(cell: Record) -> Entry:
        value = cell[column]
        if value is None:
            return Entry(NONE)
        low, high = cell.get(f"{column}_low"), cell.get(f"{column}_high")
        shown = text(value) if low is None or high is None else f"{text(value)} [{text(low)}, {text(high)}]"
        if cell[doubt]:
            return Entry(f"{shown} ?", None, "doubt", f"unreliable: {cell[doubt]}")
        return Entry(shown, value)

    return show


def _milliseconds(column: str) -> Show:
    return _timed(f"seconds_{column}", lambda seconds: f"{1000 * seconds:.1f}")


def _accuracy(cell: Record) -> Entry:
    if not cell["reachable"]:
        return Entry("not reachable")
    if cell["accuracy"] is None:
        return Entry(NONE)
    bounds = f"[{100 * cell['accuracy_low']:.1f}, {100 * cell['accuracy_high']:.1f}]"
    return Entry(f"{100 * cell['accuracy']:.1f} {bounds}", cell["accuracy"])


def _kept(cell: Record) -> Entry:
    mean, low, high = (cell[f"retention_{word}"] for word in ("mean", "min", "max"))
    if mean is None:
        return Entry(NONE)
    return Entry(f"{100 * mean:.2f}" + (f" [{100 * low:.2f}, {100 * high:.2f}]" if low < high else ""), mean)


def _paired(name: str) -> Show:
    def show(cell: Record) -> Entry:
        wins, losses = cell[f"wins_{name}"], cell[f"losses_{name}"]
        if wins is None:
            return Entry(NONE)
        return Entry(f"+{wins} −{losses}, p {chance(cell[f'mcnemar_p_{name}'])}", wins - losses)

    return show


def _timing(cell: Record) -> Entry:
    reason = cell["cost_doubt"] or cell["speedup_doubt"]
    return Entry(f"unreliable: {reason}", reason, "doubt") if reason else Entry(NONE)


COLUMNS: dict[str, Show] = {
    "asked, %": _number("keep_ratio", lambda ratio: f"{100 * ratio:g}"),
    "seed": _number("seed", str),
    "accuracy [95 %], %": _accuracy,
    "kept [least, most], %": _kept,
    "against all tokens": _paired("full"),
    "against random": _paired("random"),
    "differs, %": _number("differs_from_full", lambda part: f"{100 * part:.1f}"),
    "empty, %": _number("empty_answers", lambda part: f"{100 * part:.1f}"),
    "n": _number("n", lambda count: f"{count:,}"),
    "errors": _number("errors", lambda count: f"{count:,}"),
    "decode, ms": _milliseconds("decode"),
    "vision, ms": _milliseconds("vision"),
    "selection, ms": _milliseconds("selection"),
    "prefill, ms": _milliseconds("prefill"),
    "a token, ms": _milliseconds("per_token"),
    "total, ms": _milliseconds("total"),
    "videos/s": _timed("videos_per_second", lambda pace: f"{pace:.2f}"),
    "allowed ×": _number("speedup_allowed", lambda factor: f"{factor:.2f}"),
    "measured ×": _timed("speedup_measured", lambda factor: f"{factor:.2f}", "speedup_doubt"),
    "timing": _timing,
    "peak memory": _number("peak_memory_bytes", mebibytes),
    "keys, values": _number("kv_bytes", mebibytes),
    "GFLOPs": _number("flops_total", lambda count: f"{count / 1e9:.3g}"),
}


def cell_table(comparison: Comparison) -> Table:
    """Every cell of the sweep; columns in which no cell has a value are left out."""
    shown = {title: [show(cell) for cell in comparison.cells] for title, show in COLUMNS.items()}
    shown = {title: entries for title, entries in shown.items() if any(entry.text != NONE for entry in entries)}
    rows = []
    for cell, entries in zip(comparison.cells, zip(*shown.values(), strict=True), strict=True):
        name = "all tokens" if cell["method"] == FULL else cell["method"]
        first = Entry(name, name, note=cell["settings"] if cell["reachable"] else cell["reason"])
        rows.append(Row((first, *entries), cell["method"], cell["cell"]))
    return Table(("method", *shown), tuple(rows))
