"""The plots of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pipeline.sweep.cells import RANDOM
from pipeline.sweep.report.data import GROUPS, SUBJECT, Comparison, Point
from pipeline.sweep.report.style import INK, STAGE_COLOURS, Look, Plot, gid, looks, new_figure, save, spread
from pipeline.sweep.report.words import share

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
    for number, group in enumerate(GROUPS, 1):
        mine = [method for method in curves if comparison.group(method) == group]
        if not mine:
            continue
        shown = [*mine, *(method for method in (RANDOM, SUBJECT) if method in curves and method not in mine)]
        figure, (axes,) = new_figure(5.6, 4.2)
        axes.set_ylim(limits)
        _references(axes, comparison)
        for index, method in enumerate(shown):
            _curve(axes, curves[method], look[method], dodge=1 + 0.012 * (index - len(shown) / 2))
        _ratio_axis(axes, comparison.ratios)
        axes.set_ylabel("accuracy, %")
        _end_labels(axes, [curves[method][-1] for method in shown], look)
        plots.append(save(figure, folder, f"accuracy-{number}{suffix}", group[0].upper() + group[1:]))
    return plots


def pareto_plot(comparison: Comparison, folder: Path, suffix: str = "") -> Plot | None:
    """Accuracy against videos a second, with the points that no other beats in both; floors are left out."""
    points = [point for point in comparison.points if point.mean("videos_per_second") and point.mean("accuracy")]
    points = [point for point in points if point not in comparison.floors]
    if not points:
        return None
    look = looks(comparison)
    places = np.array([[point.mean("videos_per_second"), 100 * (point.mean("accuracy") or 0)] for point in points])
    front = pareto_front(places)
    figure, (axes,) = new_figure(9.6, 5)
    axes.step(*places[front].T, where="pre", color=INK, linewidth=1, alpha=0.6, zorder=1)
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        _dot(axes, point, x, y, look[point.method], strong=index in front)
    _name_above(axes, [points[index] for index in front], places[front], look)
    axes.set_xlabel("videos a second, decoding left out")
    axes.set_ylabel("accuracy, %")
    axes.grid(True)
    return save(figure, folder, f"pareto{suffix}", "Accuracy against videos a second, and the Pareto front")


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
    """Measured speed-up against the one that the operation counts allow."""
    points = [point for point in comparison.points if point.mean("speedup_measured") and point.mean("speedup_allowed")]
    if not points:
        return None
    look = looks(comparison)
    places = [(point, point.mean("speedup_allowed") or 1, point.mean("speedup_measured") or 1) for point in points]
    figure, (axes,) = new_figure(9.6, 4.2)
    for point, x, y in places:
        _dot(axes, point, x, y, look[point.method], strong=point.method == SUBJECT)
    _label_points(axes, [place for place in places if place[0].method == SUBJECT], look, offset=(6, -11))
    axes.axhline(1, color=INK, linewidth=0.8, alpha=0.4)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.axline((1, 1), slope=1, color=INK, linewidth=0.9, alpha=0.6, linestyle=":")
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_xlabel("speed-up that the operation counts allow (dotted: all of it measured)")
    axes.set_ylabel("speed-up measured")
    axes.grid(True)
    return save(figure, folder, f"speedup{suffix}", "Measured against allowed speed-up")


def stage_plot(comparison: Comparison, ratio: float, folder: Path, suffix: str = "") -> Plot | None:
    """Where the seconds of a clip go, method by method, at a keep ratio."""
    points = [point for point in _with_full(comparison, ratio) if point.seconds_answering]
    if not points:
        return None
    points = points[:1] + sorted(points[1:], key=lambda point: point.seconds_answering or 0)
    figure, (axes,) = new_figure(8, 1.1 + 0.23 * len(points))
    left = np.zeros(len(points))
    for stage, column in _stage_columns().items():
        seconds = np.array([1000 * column(point) for point in points])
        bars = axes.barh(range(len(points)), seconds, left=left, color=STAGE_COLOURS[stage], label=stage)
        for bar, point in zip(bars, points, strict=True):
            bar.set_gid(gid(point))
        left += seconds
    _rows(axes, points)
    axes.set_xlabel("milliseconds a clip with one question (medians)")
    figure.legend(loc="outside upper center", ncols=len(STAGE_COLOURS))
    return save(figure, folder, f"stages-{ratio:g}{suffix}", f"Time by stage, keeping {share(ratio)}")


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
    first = next(iter(panels.values()))
    points = points[:1] + sorted(points[1:], key=lambda point: point.mean(first) or 0)
    look = looks(comparison)
    figure, axes = new_figure(8, 0.8 + 0.23 * len(points), columns=len(panels))
    for panel, (title, column) in zip(axes, panels.items(), strict=True):
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
    table = np.array([[100 * point.kinds().get(kind, np.nan) for kind in kinds] for point in points])
    figure, (axes,) = new_figure(2.4 + 0.68 * len(kinds), 1.5 + 0.25 * len(points))
    mesh = axes.pcolormesh(np.ma.masked_invalid(table), cmap="cividis", edgecolors="none")
    axes.set_yticks(np.arange(len(points)) + 0.5, [point.label for point in points])
    _emphasize(axes, points)
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=35, ha="left", rotation_mode="anchor")
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
        return lambda point: point.mean(f"seconds_{column}") or 0

    def answer(point: Point) -> float:
        before = sum(point.mean(f"seconds_{stage}") or 0 for stage in ("vision", "selection", "prefill"))
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


def _references(axes: Axes, comparison: Comparison) -> None:
    """The full model as a line, floors as dotted ones, named at the left end; those below the axes only by name."""
    low = axes.get_ylim()[0]
    place = axes.get_yaxis_transform()
    below = []
    for point in [*([comparison.full] if comparison.full else []), *comparison.floors]:
        accuracy = 100 * (point.mean("accuracy") or 0)
        if accuracy < low:
            below.append(f"{point.label} {accuracy:.0f}")
            continue
        dashes = "-" if point is comparison.full else ":"
        axes.axhline(accuracy, color=INK, linestyle=dashes, linewidth=1, alpha=0.6)
        axes.text(0.01, accuracy, point.label, transform=place, fontsize=7.5, va="bottom", alpha=0.8)
    if below:
        axes.text(0.01, 0.01, f"below: {', '.join(below)}", transform=axes.transAxes, fontsize=7.5, alpha=0.8)


def _curve(axes: Axes, points: Sequence[Point], look: Look, dodge: float) -> None:
    """One method; its interval is the mean of those of its seeds."""
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
        zorder=3 if look.width > 2 else 2,
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


def _end_labels(axes: Axes, ends: Sequence[Point], look: dict[str, Look]) -> None:
    """Names beside the last points, pushed apart; a curve that stops earlier is named where it stops."""
    scored = [(end, 100 * (end.mean("accuracy") or 0)) for end in ends]
    last = min(end.keep_ratio or 0 for end, _ in scored)
    early = [(end, _realised(end), accuracy) for end, accuracy in scored if (end.keep_ratio or 0) > last]
    _label_points(axes, early, look, offset=(5, -10))
    reached = [(end, accuracy) for end, accuracy in scored if end.keep_ratio == last]
    low, high = axes.get_ylim()
    margin = 0.02 * (high - low)
    places = spread([accuracy for _, accuracy in reached], (high - low) / 24, low + margin, high - margin)
    edge = axes.get_xlim()[1]
    for (end, accuracy), place in zip(reached, places, strict=True):
        line = axes.plot([_realised(end), edge * 0.97], [accuracy, place], linewidth=0.5, alpha=0.7, clip_on=False)[0]
        line.set_color(look[end.method].colour)
        text = axes.text(edge * 0.94, place, end.method, color=look[end.method].colour, fontsize=8, va="center")
        text.set_fontweight("bold" if end.method == SUBJECT else "normal")
        for artist in (line, text):
            artist.set_gid(gid(end))


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


def _label_points(
    axes: Axes,
    places: Sequence[tuple[Point, float, float]],
    look: dict[str, Look],
    offset: tuple[float, float],
) -> None:
    for point, x, y in places:
        axes.annotate(
            point.title,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            fontsize=8,
            color=look[point.method].colour,
            gid=gid(point),
        )


def _name_above(axes: Axes, points: Sequence[Point], places: np.ndarray, look: dict[str, Look]) -> None:
    """Slanted names in a row above the axes, pushed apart, with a thin line down to each point."""
    left, right = axes.get_xlim()
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
