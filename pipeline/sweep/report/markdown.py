"""The report for places that show Markdown: findings, compact tables, links to the plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pipeline.sweep.report.data import Sweep
from pipeline.sweep.report.findings import Caution, cautions, frames_seen, headline
from pipeline.sweep.report.page import RULES, measured_how, title_of
from pipeline.sweep.report.pictures import Pictures
from pipeline.sweep.report.tables import Table, accuracy_table, standing_table


def render_markdown(sweep: Sweep, pictures: Sequence[Pictures]) -> str:
    """The same findings as the page's.

    Args:
        pictures: the plots of each of `sweep.comparisons`.
    """
    lines = [f"# {plain(title_of(sweep))}", ""]
    for comparison, plots in zip(sweep.comparisons, pictures, strict=True):
        if len(sweep.comparisons) > 1:
            lines += [f"## With {frames_seen(sweep, comparison)}", ""]
        lines += [*_table(accuracy_table(comparison)), ""]
        # In the order of the page: the table of methods, the findings, what to be careful about, the plots.
        lead, *findings = headline(sweep, comparison)
        lines += [plain(lead), "", *_bullets(findings), ""]
        table = standing_table(sweep, comparison)
        lines += [*_table(table), "", plain(RULES), ""] if table.rows else []
        lines += [*_cautions(cautions(comparison)), ""]
        for plot in plots.all:
            lines += [f"![{plain(plot.title)}](plots/{plot.name}.png)"]
            lines += ["", plain(plot.note), ""] if plot.note else []
        lines.append("")
    return "\n".join([*lines, "### How it was measured", "", *_bullets(measured_how(sweep)), ""])


def plain(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _bullets(texts: Iterable[str]) -> list[str]:
    return [f"* {plain(text)}" for text in texts]


def _cautions(found: Iterable[Caution]) -> list[str]:
    """A bullet for each, its details as bullets below."""
    lines = []
    for caution in found:
        lines += [f"* {plain(caution.text)}", *(f"  * {plain(detail)}" for detail in caution.details)]
    return lines


def _table(table: Table) -> list[str]:
    rows = [table.head, *([entry.text for entry in row.entries] for row in table.rows)]
    lines = [[plain(text) for text in row] for row in rows]
    lines.insert(1, ["---", *["---:"] * (len(table.head) - 1)])
    return [f"| {' | '.join(line)} |" for line in lines]
