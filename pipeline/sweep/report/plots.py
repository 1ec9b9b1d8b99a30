"""The plots of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from pipeline.sweep.cells import RANDOM
from pipeline.sweep.report.data import GROUPS, SUBJECT, Comparison, Point
from pipeline.sweep.report.style import INK, STAGE_COLOURS, Look, Plot, gid, looks, new_figure, save, spread
from pipeline.sweep.report.words import listed, share

MIB = 2**20


def accuracy_plots(comparison: Comparison, folder: Path, suffix: str = "") -> list[Plot]:
    """Accuracy against realised keep ratio with 95 % intervals, one plot for each group of methods."""
    limits = _accuracy_range(comparison)
    if limits is None:
        return []
    look = looks(comparison)
    curves = {
        method: [point for point in comparison.of(method) if point.mean("accuracy") is not None]
        for method in comparison.methods
    }
    curves = {method: points for method, points in curves.items() if points}
    plots = []
    # A panel for each group, numbered alike whichever groups there are; ViTCoP and random stand in all of them.
    for number, group in enumerate(GROUPS, 1):
        mine = [method for method in curves if comparison.group(method) == group]
        if not mine:
            continue
        shown = [*mine, *(method for method in (RANDOM, SUBJECT) if method in curves and method not in mine)]
        figure, (axes,) = new_figure(5.6, 4.2)
        axes.set_ylim(limits)
        # Curves are set a little apart, so that the intervals at one ratio don't hide each other.
        for index, method in enumerate(shown):
            _curve(axes, curves[method], look[method], dodge=1 + 0.012 * (index - len(shown) / 2))
        _ratio_axis(axes, comparison.ratios)
        axes.set_ylabel("accuracy, %")
        labels = _references(axes, comparison)
        labels += [_end_label(curves[method][-1], comparison, look) for method in shown]
        _name_beside(axes, labels)
        plots.append(save(figure, folder, f"accuracy-{number}{suffix}", group[0].upper() + group[1:]))
    return plots


def pareto_plot(comparison: Comparison, folder: Path, suffix: str = "") -> Plot | None:
    """Accuracy against videos a second, with the points that no other beats in both; floors are left out."""
    scored = [point for point in comparison.points if point.mean("accuracy") and point not in comparison.floors]
    points = [point for point in scored if point.timed("videos_per_second")]
    if not points:
        return None
    look = looks(comparison)
    # (N, 2) pace and accuracy
    places = np.array([[point.timed("videos_per_second"), 100 * (point.mean("accuracy") or 0)] for point in points])
    front = pareto_front(places)
    figure, (axes,) = new_figure(9.6, 5)
    axes.step(*places[front].T, where="pre", color=INK, linewidth=1, alpha=0.6, zorder=1)
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        _dot(axes, point, x, y, look[point.method], strong=index in front)
        # Quartiles of all points would hide the points.
        if index in front or point.method == SUBJECT:
            _quartiles(axes, point, (x, y), "x", _range(point, "videos_per_second"), look)
    _name_above(axes, [points[index] for index in front], places[front], look)
    axes.set_xlabel("videos a second, decoding left out; bars: quartiles over rounds")
    axes.set_ylabel("accuracy, %")
    axes.grid(True)
    title = "Accuracy against videos a second, and the Pareto front"
    return save(figure, folder, f"pareto{suffix}", title, _left_out(point for point in scored if point.cost_doubt))


def _left_out(points: Iterable[Point]) -> str:
    """Which points a plot leaves out because their times can't be relied on."""
    titles = [point.title for point in points]
    return f"Left out, timings unreliable: {listed(titles)}." if titles else ""


def _range(point: Point, column: str) -> tuple[float, float] | None:
    """Quartiles of a cost over rounds; None where they are not recorded."""
    low, high = point.timed(f"{column}_low"), point.timed(f"{column}_high")
    return None if low is None or high is None else (low, high)


def _quartiles(
    axes: Axes,
    point: Point,
    place: tuple[float, float],
    along: Literal["x", "y"],
    ends: tuple[float, float] | None,
    look: dict[str, Look],
) -> None:
    """A thin bar through a place, between the quartiles `ends`."""
    if ends is None:
        return
    middle = place[0 if along == "x" else 1]
    # (2, 1) lengths to either side; means over seeds may lie a little outside their quartiles
    sides = np.clip([[middle - ends[0]], [ends[1] - middle]], 0, None)
    across, up = (sides, None) if along == "x" else (None, sides)
    colour = look[point.method].colour
    _, _, (bar,) = axes.errorbar(*place, xerr=across, yerr=up, color=colour, elinewidth=0.9, zorder=1)
    bar.set_gid(gid(point))


def pareto_front(places: np.ndarray) -> list[int]:
    """Which (x, y) no other place beats in one without losing in the other; by ascending x."""
    front: list[int] = []
    best = -np.inf
    for index in np.lexsort((-places[:, 1], -places[:, 0])):
        if places[index, 1] > best:
            best = places[index, 1]
            front.append(int(index))
    return front[::-1]


def speedup_plot(comparison: Comparison, folder: Path, suffix: str = "") -> Plot | None:
    """Measured speed-up against the one that the operation counts allow, both on logarithmic axes."""
    allowed = [point for point in comparison.points if point.mean("speedup_allowed")]
    points = [point for point in allowed if point.speedup()]
    if not points:
        return None
    look = looks(comparison)
    places = [(point, point.mean("speedup_allowed") or 1, point.speedup() or 1) for point in points]
    figure, (axes,) = new_figure(9.6, 4.2)
    # Factors: from 1 to 2 is as far as from 2 to 4.
    axes.set(xscale="log", yscale="log")
    for point, x, y in places:
        _dot(axes, point, x, y, look[point.method], strong=point.method == SUBJECT)
        if point.method == SUBJECT:
            low, high = point.speedup("_low"), point.speedup("_high")
            _quartiles(axes, point, (x, y), "y", None if low is None or high is None else (low, high), look)
    axes.axhline(1, color=INK, linewidth=0.8, alpha=0.4)
    # The diagonal must not widen the axes.
    limits = axes.get_xlim(), axes.get_ylim()
    axes.plot(limits[0], limits[0], color=INK, linewidth=0.9, alpha=0.6, linestyle=":")
    axes.set(xlim=limits[0], ylim=limits[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Only ViTCoP's points are named: most others lie on each other.
    mine = [(place, look[SUBJECT].colour) for place in places if place[0].method == SUBJECT]
    _name_beside(axes, [Label(point.title, x, y, colour, point) for (point, x, y), colour in mine])
    axes.set_xlabel("speed-up that the operation counts allow (dotted: all of it measured)")
    axes.set_ylabel("speed-up measured")
    axes.grid(True)
    note = _left_out(point for point in allowed if point.doubt)
    return save(figure, folder, f"speedup{suffix}", "Measured against allowed speed-up", note)


def stage_plot(comparison: Comparison, ratio: float, folder: Path, suffix: str = "") -> Plot | None:
    """Where the seconds of a clip go, method by method, at a keep ratio."""
    measured = [point for point in _with_full(comparison, ratio) if point.mean("seconds_total")]
    points = [point for point in measured if point.seconds_answering]
    if not points:
        return None
    points = points[:1] + sorted(points[1:], key=lambda point: point.seconds_answering or 0)
    figure, (axes,) = new_figure(8, 1.1 + 0.23 * len(points))
    # All tokens first, then the fastest; each stage's bars begin where those of the stage before end.
    left = np.zeros(len(points))
    for stage, column in _stage_columns().items():
        seconds = np.array([1000 * column(point) for point in points])
        bars = axes.barh(range(len(points)), seconds, left=left, color=STAGE_COLOURS[stage], label=stage)
        for bar, point in zip(bars, points, strict=True):
            bar.set_gid(gid(point))
        left += seconds
    look = dict.fromkeys((point.method for point in points), Look(INK, "", "-", 1))
    for row, point in enumerate(points):
        if ends := _range(point, "seconds_total"):
            # The bar ends with the decoding, which has no rounds.
            decode = point.timed("seconds_decode") or 0
            _quartiles(axes, point, (left[row], row), "x", (1000 * (ends[0] + decode), 1000 * (ends[1] + decode)), look)
    _rows(axes, points)
    axes.set_xlabel("milliseconds a clip with one question (medians; black: quartiles of the total)")
    figure.legend(loc="outside upper center", ncols=len(STAGE_COLOURS))
    note = _left_out(point for point in measured if point.cost_doubt)
    return save(figure, folder, f"stages-{ratio:g}{suffix}", f"Time by stage, keeping {share(ratio)}", note)


def memory_plot(comparison: Comparison, ratio: float, folder: Path, suffix: str = "") -> Plot | None:
    """Peak memory, and bytes of keys and values after the prefill, at a keep ratio."""
    panels = {
        title: column
        for title, column in (("peak memory, MiB", "peak_memory_bytes"), ("keys and values, MiB", "kv_bytes"))
        if any(point.mean(column) for point in _with_full(comparison, ratio))
    }
    if not panels:
        return None
    points = _with_full(comparison, ratio)
    # All tokens first, then by the first of the panels there are (the peak, or keys and values on a CPU).
    first = next(iter(panels.values()))
    points = points[:1] + sorted(points[1:], key=lambda point: point.mean(first) or 0)
    look = looks(comparison)
    figure, axes = new_figure(8, 0.8 + 0.23 * len(points), columns=len(panels))
    for panel, (title, column) in zip(axes, panels.items(), strict=True):
        # A bar a method, the same rows in both panels.
        for row, point in enumerate(points):
            size = point.mean(column)
            if size is None:
                panel.text(0, row, " not measured", va="center", fontsize=8, gid=gid(point))
            else:
                panel.barh(row, size / MIB, color=look[point.method].colour)[0].set_gid(gid(point))
        _rows(panel, points, named=panel is axes[0])
        panel.set_xlabel(title)
    return save(figure, folder, f"memory-{ratio:g}{suffix}", f"Memory, keeping {share(ratio)}")


def kind_plot(comparison: Comparison, ratio: float, folder: Path, suffix: str = "") -> Plot | None:
    """Accuracy of each method on each kind of question, at a keep ratio."""
    points = [point for point in _with_full(comparison, ratio) if point.kinds()]
    kinds = sorted({kind for point in points for kind in point.kinds()})
    if not kinds:
        return None
    # (methods, kinds) accuracies in per cent; NaN where a method has no answer of that kind
    table = np.array([[100 * point.kinds().get(kind, np.nan) for kind in kinds] for point in points])
    figure, (axes,) = new_figure(2.4 + 0.68 * len(kinds), 1.5 + 0.25 * len(points))
    mesh = axes.pcolormesh(np.ma.masked_invalid(table), cmap="cividis", edgecolors="none")
    axes.set_yticks(np.arange(len(points)) + 0.5, [point.label for point in points])
    _emphasize(axes, points)
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=35, ha="left", rotation_mode="anchor")
    # Read like a table: kinds above, the first method in the top row.
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _write_values(axes, table, points, mesh)
    return save(figure, folder, f"kinds-{ratio:g}{suffix}", f"Accuracy by kind, %, keeping {share(ratio)}")


def _write_values(axes: Axes, table: np.ndarray, points: Sequence[Point], mesh: QuadMesh) -> None:
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            bright = np.dot(mesh.to_rgba(value)[:3], (0.3, 0.59, 0.11)) > 0.5
            text = axes.text(column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8)
            text.set_color("black" if bright else "white")
            text.set_gid(gid(points[row]))


def _with_full(comparison: Comparison, ratio: float) -> list[Point]:
    """The full model first, then all points at the ratio."""
    return [*([comparison.full] if comparison.full else []), *comparison.at(ratio)]


def _stage_columns() -> dict[str, Callable[[Point], float]]:
    """Seconds of each stage of `STAGE_COLOURS`; the answer takes what the others leave of the total."""

    def seconds(column: str) -> Callable[[Point], float]:
        return lambda point: point.timed(f"seconds_{column}") or 0

    def answer(point: Point) -> float:
        before = sum(point.timed(f"seconds_{stage}") or 0 for stage in ("vision", "selection", "prefill"))
        return max((point.seconds_answering or 0) - before, 0)

    columns = (seconds("vision"), seconds("selection"), seconds("prefill"), answer, seconds("decode"))
    return dict(zip(STAGE_COLOURS, columns, strict=True))


def _rows(axes: Axes, points: Sequence[Point], *, named: bool = True) -> None:
    axes.set_yticks(range(len(points)), [point.label if named else "" for point in points])
    _emphasize(axes, points)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)


def _emphasize(axes: Axes, points: Sequence[Point]) -> None:
    """Names on the y axis: ViTCoP's is bold, and each is marked as its method's."""
    for label, point in zip(axes.get_yticklabels(), points, strict=True):
        label.set_fontweight("bold" if point.method == SUBJECT else "normal")
        label.set_gid(gid(point))


@dataclass(frozen=True)
class Label:
    """A name for a place (data coordinates), to be written beside the axes."""

    text: str
    x: float
    y: float
    colour: str
    point: Point
    early: bool = False
    """Whether the place lies well inside the axes, so that the line to it is dotted."""


def _references(axes: Axes, comparison: Comparison) -> list[Label]:
    """The full model as a line, floors as dotted ones; returns their names. Those below the axes are only named."""
    low = axes.get_ylim()[0]
    edge = axes.get_xlim()[1]
    below, labels = [], []
    for point in [*([comparison.full] if comparison.full else []), *comparison.floors]:
        accuracy = 100 * (point.mean("accuracy") or 0)
        if accuracy < low:
            below.append(f"{point.label} {accuracy:.0f}")
            continue
        dashes = "-" if point is comparison.full else ":"
        axes.axhline(accuracy, color=INK, linestyle=dashes, linewidth=1, alpha=0.6)
        labels.append(Label(point.label, edge, accuracy, INK, point))
    if below:
        axes.text(0.01, 0.01, f"below: {', '.join(below)}", transform=axes.transAxes, fontsize=7.5, alpha=0.8)
    return labels


def _curve(axes: Axes, points: Sequence[Point], look: Look, dodge: float) -> None:
    """One method; its interval is the mean of those of its seeds."""
    # (R,) realised ratios, and accuracies with the ends of their intervals
    x = np.array([_realised(point) for point in points]) * dodge
    middle, low, high = (
        100 * np.array([point.mean(column) for point in points], dtype=float)
        for column in ("accuracy", "accuracy_low", "accuracy_high")
    )
    line, _, (bars,) = axes.errorbar(
        x,
        middle,
        yerr=np.clip([middle - low, high - middle], 0, None),
        color=look.colour,
        linestyle=look.dashes,
        linewidth=look.width,
        marker=look.marker,
        markersize=5 if look.width > 2 else 3.5,
        elinewidth=0.9,
        zorder=3 if look.width > 2 else 2,  # ViTCoP above the others
    )
    bars.set_alpha(0.6)
    for artist in (line, bars):
        artist.set_gid(gid(points[-1]))


def _ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(max(ratios) * 1.25, min(ratios) * 0.85)
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.set_xlabel("visual tokens kept, % (mean over layers, realised)")
    axes.grid(True)


def _end_label(end: Point, comparison: Comparison, look: dict[str, Look]) -> Label:
    """The name of a curve, for its last point; a curve that stops before the smallest ratio says where."""
    early = end.keep_ratio != comparison.ratios[-1]
    text = f"{end.method} (to {share(end.keep_ratio or 0)})" if early else end.method
    return Label(text, _realised(end), 100 * (end.mean("accuracy") or 0), look[end.method].colour, end, early)


def _name_beside(axes: Axes, labels: Sequence[Label]) -> None:
    """Names in a column to the right of the axes, pushed apart, with a thin line to each place."""
    # Heights as fractions of the axes, whatever their scale, so that names keep their distance.
    to_axes = axes.transScale + axes.transLimits
    heights = [float(to_axes.transform((label.x, label.y))[1]) for label in labels]
    for label, height in zip(labels, spread(heights, 1 / 23, 0, 1), strict=True):
        line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            fontweight="bold" if label.point.method == SUBJECT else "normal",
            color=label.colour,
            annotation_clip=False,
            arrowprops=line | {"linestyle": ":" if label.early else "-", "alpha": 0.6, "relpos": (0, 0.5)},
        )
        for artist in filter(None, (text, text.arrow_patch)):
            artist.set_gid(gid(label.point))


def _realised(point: Point) -> float:
    return point.mean("retention_mean") or point.keep_ratio or 1.0


def _dot(axes: Axes, point: Point, x: float, y: float, look: Look, *, strong: bool) -> None:
    axes.plot(
        x,
        y,
        marker=look.marker,
        color=look.colour,
        markersize=8 if strong else 5,
        alpha=1 if strong or point.method == SUBJECT else 0.55,
        linestyle="none",
        gid=gid(point),
        zorder=3 if point.method == SUBJECT else 2,
    )


def _name_above(axes: Axes, points: Sequence[Point], places: np.ndarray, look: dict[str, Look]) -> None:
    """Slanted names in a row above the axes, pushed apart, with a thin line down to each point."""
    left, right = axes.get_xlim()
    # The names slant, so they need no more room side by side than their height.
    spots = spread(places[:, 0], (right - left) / 36, left, right)
    for point, place, spot in zip(points, places, spots, strict=True):
        colour = look[point.method].colour
        text = axes.annotate(
            point.title,
            tuple(place),
            xytext=(spot, 1.02),
            textcoords=axes.get_xaxis_transform(),
            rotation=40,
            rotation_mode="anchor",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7, "shrinkA": 0, "shrinkB": 0},
        )
        for artist in filter(None, (text, text.arrow_patch)):
            artist.set_gid(gid(point))


def _accuracy_range(comparison: Comparison) -> tuple[float, float] | None:
    """Limits that hold all intervals but those of floors, the same for all groups; None without accuracies."""
    bounds = [
        100 * value
        for point in comparison.points
        if point not in comparison.floors
        for column in ("accuracy_low", "accuracy_high")
        if (value := point.mean(column)) is not None
    ]
    return (max(min(bounds) - 3, 0), min(max(bounds) + 3, 101)) if bounds else None
