"""Draw how many visual tokens each layer sees, by method, at equal mean: `python -m benchmarks.layers`.

Counts come from the methods' own plans for LLaVA-OneVision 7B: 28 layers, 32 frames of 14 x 14 tokens.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import tyro

matplotlib.use("svg")
from matplotlib import pyplot as plt

from vitcop import get_method
from vitcop.budget import Geometry

GEOMETRY = Geometry(num_layers=28, frames=32, height=14, width=14)
RATIOS = (0.5, 0.25, 0.1)
COLORS = ("#0072b2", "#009e73", "#d55e00")
RIVALS = {
    "vitcop": ("ViTCoP", "#009e73"),
    "random": ("before the model (most methods)", "#555555"),
    "fastv": ("FastV", "#cc79a7"),
    "pyramiddrop": ("PyramidDrop", "#e69f00"),
}


def draw(output: Path = Path("vitcop/layers.svg")) -> None:
    """Write the figure."""
    figure, (ours, rivals) = plt.subplots(1, 2, figsize=(9.5, 3.3), sharey=True, layout="constrained")
    layers = range(GEOMETRY.num_layers)
    for ratio, color in zip(RATIOS, COLORS, strict=True):
        counts = get_method("vitcop")(retention_ratio=ratio).plan(GEOMETRY).per_layer(GEOMETRY.num_layers)
        ours.step(layers, counts, where="mid", color=color, label=f"{ratio:.0%} (mean {sum(counts) / 28:.0f})")
    ours.set_title("ViTCoP at three retention ratios")
    for name, (label, color) in RIVALS.items():
        counts = get_method(name)(retention_ratio=0.3).plan(GEOMETRY).per_layer(GEOMETRY.num_layers)
        rivals.step(layers, counts, where="mid", color=color, label=label)
    rivals.set_title("The same mean, 30 %, spent by several methods")
    for axes in (ours, rivals):
        axes.axhline(GEOMETRY.num_tokens, color="#999", linewidth=0.8, linestyle=":")
        axes.set_xlabel("layer of the language model")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    ours.set_ylabel("visual tokens")
    ours.text(0.3, GEOMETRY.num_tokens * 0.965, "all 6,272", fontsize=8, color="#666", va="top")
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    tyro.cli(draw, description=__doc__)
