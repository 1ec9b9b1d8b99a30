"""The report of a sweep: one page with plots, tables and a gallery, made from the files of its folder alone."""

from __future__ import annotations

from pathlib import Path

from pipeline.sweep.report.data import load_sweep
from pipeline.sweep.report.markdown import render_markdown
from pipeline.sweep.report.page import render_page
from pipeline.sweep.report.pictures import draw


def write_report(folder: Path) -> Path:
    """Writes `report.html`, `report.md` and `plots/*.png` into a sweep's folder; returns the page's path.

    Raises:
        ConfigError: the folder holds no finished sweep.
    """
    sweep = load_sweep(folder)
    several = len(sweep.comparisons) > 1
    pictures = [
        draw(
            comparison,
            folder / "plots",
            chosen=sweep.chosen_ratio,
            suffix=f"-{comparison.num_frames}f" if several else "",
        )
        for comparison in sweep.comparisons
    ]
    (folder / "report.md").write_text(render_markdown(sweep, pictures), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render_page(sweep, pictures), encoding="utf-8")
    return page
