"""How the plots look."""

import numpy as np

from pipeline.sweep.report.style import spread


def test_labels_are_pushed_apart_but_stay_in_order() -> None:
    placed = spread([5.0, 5.0, 5.1, 9.0], gap=1.0, low=0, high=10)
    assert (np.diff(placed) >= 0.99).all() and placed.min() >= 0 and placed.max() <= 10
    crowded = spread([1.0] * 5, gap=10, low=0, high=10)
    assert crowded.min() >= 0 and crowded.max() <= 10
