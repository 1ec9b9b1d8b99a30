"""The plots."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from pipeline.sweep.report import write_report
from pipeline.sweep.report.data import Point, load_sweep
from pipeline.sweep.report.plots import Label, _name_beside, pareto_front
from pipeline.sweep.report.style import new_figure
from tests.pipeline.sweep.sweeps import SMALL, cells_with, make_sweep


def test_the_front_is_what_nothing_beats() -> None:
    places = np.array([[1, 5], [2, 5], [2, 4], [3, 1], [4, 3], [0, 9]])
    assert pareto_front(places) == [5, 1, 4]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_do_not_lie_on_each_other(scale: str) -> None:
    rng = np.random.default_rng(3)
    figure, (axes,) = new_figure(5.6, 4.2)
    axes.set(xscale=scale, yscale=scale, xlim=(1, 10), ylim=(1, 10))
    points = [Point(f"method_{number}", 0.1, ()) for number in range(18)]
    _name_beside(axes, [Label(each.method, 9.0, 3 + rng.random() / 9, "black", each) for each in points])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]  # without the lines
    heights = [(box.y0 + 0.15 * box.height, box.y1 - 0.15 * box.height) for box in boxes]
    assert all(first[1] < second[0] or second[1] < first[0] for first, second in combinations(heights, 2))
    assert min(box.x0 for box in boxes) > axes.get_window_extent().x1


def test_times_that_cannot_be_relied_on_are_not_drawn(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5, 0.1), questions=24, gallery=False)
    beating = {"cost_doubt": "measured 8.85 times as fast", "speedup_doubt": "measured 8.85 times as fast"}
    cells_with(folder, {"vitcop-0.1": beating | {"speedup_measured": 8.85, "videos_per_second": 105.0}})
    text = write_report(folder).read_text().replace("\N{NO-BREAK SPACE}", " ")
    for title in ("Pareto front", "Measured against allowed", "Time by stage, keeping 10 %"):
        plot = text[text.index(title) :]
        plot = plot[: plot.index("</figure>")]
        assert "<title>evs at 10 %</title>" in plot and "<title>vitcop at 10 %</title>" not in plot
        assert "Left out, timings unreliable: vitcop at 10 %." in plot


def test_without_one_reliable_time_nothing_is_drawn(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.1,), questions=24, gallery=False)
    doubted = {"cost_doubt": "rounds disagree", "speedup_doubt": "rounds disagree"}
    cells_with(folder, {cell["cell"]: doubted for cell in load_sweep(folder).comparisons[0].cells})
    assert "No timing of this sweep can be relied on." in write_report(folder).read_text()
    names = {picture.name for picture in (folder / "plots").iterdir()}
    assert not names & {"pareto.png", "speedup.png", "stages-0.1.png"} and "memory-0.1.png" in names
