"""Which plots a comparison gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from pipeline.sweep.report.data import Comparison
from pipeline.sweep.report.plots import accuracy_plots, kind_plot, memory_plot, pareto_plot, speedup_plot, stage_plot
from pipeline.sweep.report.style import SETTINGS, Plot

USUAL_RATIO = 0.25
"""Where most published comparisons are made."""

PlotAtRatio = Callable[[Comparison, float, Path, str], Plot | None]


@dataclass(frozen=True)
class Pictures:
    """The plots of a comparison; those at a keep ratio by ratio, the chosen one first."""

    accuracy: list[Plot]
    speed: list[Plot]
    stages: dict[float, Plot]
    memory: dict[float, Plot]
    kinds: dict[float, Plot]

    @property
    def all(self) -> list[Plot]:
        by_ratio = (plot for plots in (self.stages, self.memory, self.kinds) for plot in plots.values())
        return [*self.accuracy, *self.speed, *by_ratio]


def draw(comparison: Comparison, folder: Path, chosen: float, suffix: str = "") -> Pictures:
    """Draws all plots, and writes their PNGs to the folder.

    Args:
        chosen: the keep ratio of bars and heat maps, or the nearest one there is.
        suffix: of file names, where there are several comparisons.
    """
    ratios = shown_ratios(comparison, chosen)

    def at_ratios(draw_one: PlotAtRatio) -> dict[float, Plot]:
        plots = ((ratio, draw_one(comparison, ratio, folder, suffix)) for ratio in ratios)
        return {ratio: plot for ratio, plot in plots if plot is not None}

    with matplotlib.rc_context(SETTINGS):
        speed = (pareto_plot(comparison, folder, suffix), speedup_plot(comparison, folder, suffix))
        return Pictures(
            accuracy=accuracy_plots(comparison, folder, suffix),
            speed=[plot for plot in speed if plot is not None],
            stages=at_ratios(stage_plot),
            memory=at_ratios(memory_plot),
            kinds=at_ratios(kind_plot),
        )


def shown_ratios(comparison: Comparison, chosen: float) -> list[float]:
    """The ratio nearest to the chosen one, the one nearest to the usual one, and the smallest."""
    if not comparison.ratios:
        return []
    wanted = (chosen, USUAL_RATIO, min(comparison.ratios))
    return list(dict.fromkeys(map(comparison.nearest, wanted)))
