"""How the plots look: one colour and marker for a method in all of them, and ink that follows the page's colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.sweep.cells import FULL, RANDOM
from pipeline.sweep.report.data import BASELINES, GROUPS, SUBJECT, Comparison, Point

INK = "#010203"
"""Text and axes; in the page it becomes `currentColor`, so that a plot reads on light and on dark."""
SUBJECT_COLOUR = "#d55e00"
RANDOM_COLOUR = "#808080"
# Each has a contrast of 3 or more with white and with near-black, and no orange or grey, which are taken.
PALETTE = ("#0077bb", "#009371", "#b8539a", "#8a7a00", "#7a68d8", "#2b93a8", "#5f8c2e", "#a8554f", "#5b7d9c", "#9a6fb0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖◀▶⬟", strict=True))
"""The markers as text."""
STAGE_COLOURS = {
    "vision tower": "#0077bb",
    "selection": SUBJECT_COLOUR,
    "prefill": "#009371",
    "answer": "#b8539a",
    "decoding the video": "#9a9a9a",
}

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,
}
"""Changes to Matplotlib's defaults, under which figures are both made and saved."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    dashes: str
    width: float


def looks(comparison: Comparison) -> dict[str, Look]:
    """The look of every method; colours repeat between groups, with other markers."""
    found = {FULL: Look(INK, "*", "-", 1.2)}
    used: dict[str, int] = {}
    for method in comparison.methods:
        group = comparison.group(method)
        dashes = "--" if group == BASELINES else "-"
        if method == SUBJECT:
            found[method] = Look(SUBJECT_COLOUR, "o", "-", 2.6)
        elif method == RANDOM:
            found[method] = Look(RANDOM_COLOUR, "o", "--", 1.6)
        else:
            # Colours go round within a group; each round and each group begins at another marker.
            number = used[group] = used.get(group, -1) + 1
            marker = number + number // len(PALETTE) + 3 * GROUPS.index(group)
            found[method] = Look(PALETTE[number % len(PALETTE)], MARKERS[marker % len(MARKERS)], dashes, 1.3)
    return found | {point.method: Look(INK, "_", ":", 1.0) for point in comparison.floors}


@dataclass(frozen=True)
class Plot:
    """A figure as the page and the folder hold it.

    Attributes:
        name: of its file, `plots/NAME.png`.
        svg: to be put in the page; elements of a method carry `data-method`.
        note: what the plot leaves out.
    """

    name: str
    title: str
    svg: str
    note: str = ""


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure, sizes in inches, and its axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure: Figure, folder: Path, name: str, title: str, note: str = "") -> Plot:
    """Writes the PNG and returns the figure with its SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ink takes the colour of the page's text; marked parts get an attribute and a tooltip instead of their id.
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'id="method:([^"|]*)\|([^"]*)">', r'data-method="\1"><title>\2</title>', svg)
    width = 72 * figure.get_figwidth()
    style = f'style="max-width: {width:.0f}pt; min-width: {0.7 * width:.0f}pt"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', style, svg, count=1)
    # Ids have to be the page's own, so each figure gets a prefix.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}.", svg)
    return Plot(name, title, svg, note)


def gid(point: Point) -> str:
    """The id that marks what belongs to a method; `save` turns it into an attribute and a tooltip."""
    return f"method:{point.method}|{point.title}"


def spread(wanted: Sequence[float] | np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Positions as near as may be to the wanted ones, at least `gap` apart, within [low, high] while there is room."""
    order = np.argsort(wanted, kind="stable")
    placed = np.clip(np.asarray(wanted, dtype=float)[order], low, high)
    gap = min(gap, (high - low) / max(len(placed) - 1, 1))
    # Neighbours that are too close push each other apart by half of what is missing, until all is quiet.
    for _ in range(300):
        push = np.clip(gap - np.diff(placed), 0, None) / 2
        placed[:-1] -= push
        placed[1:] += push
        placed = np.clip(placed, low, high)
    return placed[np.argsort(order)]
