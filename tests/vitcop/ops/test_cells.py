"""Grids cut into cells."""

import pytest
import torch

from vitcop.ops.cells import grid_cells


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 7), (14, 14), (1, 9), (9, 1)])
def test_cells_cover_the_grid_and_each_has_one_middle(height: int, width: int) -> None:
    quota = torch.arange(1, height * width + 1)  # (F,) every number of cells
    cell, middle = grid_cells(height, width, quota)
    assert cell.shape == middle.shape == (len(quota), height * width)
    assert torch.equal(middle.sum(dim=1), quota)
    for count, cells, middles in zip(quota.tolist(), cell, middle, strict=True):
        assert cells.unique().tolist() == list(range(count))
        assert cells[middles].unique().tolist() == list(range(count))


def test_cells_are_nearly_equal() -> None:
    quota = torch.tensor([2, 5, 12, 49])
    cell, _ = grid_cells(14, 14, quota)
    for count, cells in zip(quota.tolist(), cell, strict=True):
        sizes = cells.bincount(minlength=count)
        assert sizes.max() <= 3 * sizes.min()


def test_a_frame_without_cells_has_no_middle() -> None:
    _, middle = grid_cells(4, 4, torch.tensor([0, 3]))
    assert middle.sum(dim=1).tolist() == [0, 3]
