"""The tables of the report, as values first, so that the page and `report.md` say the same."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.sweep.cells import FULL
from pipeline.sweep.report.data import SUBJECT_TITLE, Comparison, Record, Sweep
from pipeline.sweep.report.findings import LOSS, UNTESTED, WIN, Duel, duels, standings
from pipeline.sweep.report.html import Html, element, table
from pipeline.sweep.report.words import chance, gain, mebibytes, percent, share

OUTCOMES = {WIN: "win", LOSS: "loss"}
MARKS = {"win": "right", "loss": "wrong"}
"""How the page colours what the words say."""


def standing_rows(sweep: Sweep, comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows: at each keep ratio, ViTCoP beside all tokens, random and the best other method."""
    head = ["kept", SUBJECT_TITLE, "minus all tokens", "minus random", "minus best other", "best other", "place"]
    rows = []
    for standing in standings(sweep, comparison):
        best = standing.best.rival if standing.best else None
        best_accuracy = best.mean("accuracy") if best else None
        rows.append(
            [
                share(standing.point.keep_ratio or 0),
                percent(standing.point.mean("accuracy") or 0),
                *(_told(each) for each in (standing.full, standing.random, standing.best)),
                f"{best.method} {percent(best_accuracy)}" if best and best_accuracy is not None else "",
                f"{standing.place} of {standing.field}",
            ]
        )
    return head, rows


def _told(each: Duel | None) -> str:
    if each is None:
        return ""
    p = "" if each.p is None else f", p {chance(each.p) if each.p < 0.001 else '= ' + chance(each.p)}"
    word = OUTCOMES.get(each.outcome, "untested" if each.outcome == UNTESTED else "tie")
    return f"{gain(each.difference)} ({word}{p})"


def standing_table(sweep: Sweep, comparison: Comparison) -> Html | None:
    head, rows = standing_rows(sweep, comparison)
    body = [
        element(
            "tr",
            *(
                element("td", text, class_=next((MARKS[word] for word in MARKS if f"({word}" in text), None))
                for text in row
            ),
        )
        for row in rows
    ]
    return table(head, body) if body else None


def duel_table(sweep: Sweep, comparison: Comparison) -> Html | None:
    """ViTCoP minus every other method at every keep ratio, in points."""
    found = duels(sweep, comparison)
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        cells = [_duel_cell(found.get((method, ratio))) for ratio in comparison.ratios]
        rows.append(element("tr", element("th", method, scope="row"), *cells, data_method=method))
    return table(["minus", *(share(ratio) for ratio in comparison.ratios)], rows) if rows else None


def _duel_cell(each: Duel | None) -> Html:
    if each is None:
        return element("td", "–")
    word = OUTCOMES.get(each.outcome, "")
    text = gain(each.difference) + (f" {word}" if word else "")
    return element("td", text, class_=MARKS.get(word), title=_told(each))


Shown = tuple[float | str | None, str]
"""What a column is sorted by, and what it shows."""


def _number(column: str, text: Callable[[float], str]) -> Callable[[Record], Shown]:
    return lambda cell: (cell[column], "–" if cell[column] is None else text(cell[column]))


def _milliseconds(column: str) -> Callable[[Record], Shown]:
    return _number(f"seconds_{column}", lambda seconds: f"{1000 * seconds:.1f}")


def _accuracy(cell: Record) -> Shown:
    if not cell["reachable"]:
        return None, "not reachable"
    if cell["accuracy"] is None:
        return None, "–"
    bounds = f"[{100 * cell['accuracy_low']:.1f}, {100 * cell['accuracy_high']:.1f}]"
    return cell["accuracy"], f"{100 * cell['accuracy']:.1f} {bounds}"


def _kept(cell: Record) -> Shown:
    mean, low, high = (cell[f"retention_{word}"] for word in ("mean", "min", "max"))
    if mean is None:
        return None, "–"
    return mean, f"{100 * mean:.2f}" + (f" [{100 * low:.2f}, {100 * high:.2f}]" if low < high else "")


def _paired(name: str) -> Callable[[Record], Shown]:
    def shown(cell: Record) -> Shown:
        if cell[f"wins_{name}"] is None:
            return None, "–"
        wins, losses = cell[f"wins_{name}"], cell[f"losses_{name}"]
        return wins - losses, f"+{wins} −{losses}, p {chance(cell[f'mcnemar_p_{name}'])}"

    return shown


COLUMNS: dict[str, Callable[[Record], Shown]] = {
    "method": lambda cell: (cell["method"], "all tokens" if cell["method"] == FULL else cell["method"]),
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
    "videos/s": _number("videos_per_second", lambda pace: f"{pace:.2f}"),
    "allowed ×": _number("speedup_allowed", lambda factor: f"{factor:.2f}"),
    "measured ×": _number("speedup_measured", lambda factor: f"{factor:.2f}"),
    "peak memory": _number("peak_memory_bytes", mebibytes),
    "keys, values": _number("kv_bytes", mebibytes),
    "GFLOPs": _number("flops_total", lambda count: f"{count / 1e9:.3g}"),
}


def cell_table(comparison: Comparison) -> Html:
    """Every cell; columns in which no cell has a value are left out. Sorted in the page by a click on a head."""
    cells = comparison.cells
    columns = {title: show for title, show in COLUMNS.items() if any(show(cell)[0] is not None for cell in cells)}
    rows = []
    for cell in cells:
        shown = [show(cell) for show in columns.values()]
        notes = cell["settings"] if cell["reachable"] else cell["reason"]
        first = element("th", shown[0][1], scope="row", title=notes)
        others = [element("td", text, data_value=value) for value, text in shown[1:]]
        rows.append(element("tr", first, *others, data_method=cell["method"], data_cell=cell["cell"]))
    heads = [element("th", element("button", title, type="button"), scope="col") for title in columns]
    return table(heads, rows, class_="sortable")


def compact_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows: accuracy of every method at every keep ratio, mean over seeds."""
    rows = []
    for point in [*([comparison.full] if comparison.full else []), *comparison.floors]:
        accuracy = point.mean("accuracy")
        shown = "–" if accuracy is None else f"{100 * accuracy:.1f}"
        rows.append([point.label, *[shown] * len(comparison.ratios)])
    for method in comparison.methods:
        by_ratio = {point.keep_ratio: point.mean("accuracy") for point in comparison.of(method)}
        values = [by_ratio.get(ratio) for ratio in comparison.ratios]
        rows.append([method, *("–" if value is None else f"{100 * value:.1f}" for value in values)])
    return ["accuracy, %", *(share(ratio) for ratio in comparison.ratios)], rows
