"""The report for places that show Markdown: findings, compact tables, links to the plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pipeline.sweep.report.data import Sweep
from pipeline.sweep.report.findings import frames_seen, headline, warnings
from pipeline.sweep.report.page import RULES, TITLE, measured_how
from pipeline.sweep.report.pictures import Pictures
from pipeline.sweep.report.tables import compact_rows, standing_rows


def render_markdown(sweep: Sweep, pictures: Sequence[Pictures]) -> str:
    """The same findings as the page's.

    Args:
        pictures: the plots of each of `sweep.comparisons`.
    """
    lines = [f"# {TITLE}", ""]
    for comparison, plots in zip(sweep.comparisons, pictures, strict=True):
        if len(sweep.comparisons) > 1:
            lines += [f"## With {frames_seen(sweep, comparison)}", ""]
        lead, *findings = headline(sweep, comparison)
        lines += [plain(lead), "", *_bullets(findings), ""]
        head, rows = standing_rows(sweep, comparison)
        lines += [*_table(head, rows), "", plain(RULES), ""] if rows else []
        lines += [*_bullets(warnings(comparison)), ""]
        lines += ["### Accuracy", "", *_table(*compact_rows(comparison)), ""]
        lines += [f"![{plain(plot.title)}](plots/{plot.name}.png)" for plot in plots.all] + [""]
    return "\n".join([*lines, "### How it was measured", "", *_bullets(measured_how(sweep)), ""])


def plain(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _bullets(texts: Iterable[str]) -> list[str]:
    return [f"* {plain(text)}" for text in texts]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[plain(text) for text in row] for row in (head, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(head) - 1)])
    return [f"| {' | '.join(line)} |" for line in lines]
