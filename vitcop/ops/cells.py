"""Cutting a frame's token grid into a given number of cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitcop.selection import Selection, true_indices
from vitcop.tokens import VisualTokens


def grid_cells(height: int, width: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    """Cut each frame's grid into `quota` (F,) nearly equal cells: bands of rows, each cut into columns.

    Returns:
        Cell (F, N) of each token, in raster order from 0, and a mask (F, N) of the middle token of each cell. A frame
        of quota 0 has no middle.
    """
    # As many bands as make cells about as wide as high, but no band without a cell or wider than the grid allows.
    count = quota[:, None]
    # (F,) bands that make cells about square; at least so many that no band needs more cells than it has columns
    bands = (quota * (height / width)).sqrt().round().long()
    bands = bands.clamp(max=height).minimum(quota).maximum((quota + width - 1) // width)[:, None].clamp(min=1)
    # Row r is in band r * bands // height; a band's cells are its share of the count.
    row, column = torch.arange(height, device=quota.device), torch.arange(width, device=quota.device)
    band = row * bands // height
    # (F, height) cells in the bands above a row, and (F, height, 1) cells in its own band
    before = band * count // bands
    inside = ((band + 1) * count // bands - before)[..., None].clamp(min=1)
    # (F, height, width) cell within the band
    cell = column * inside // width
    # A cell's middle token is the one in the middle of its rows and of its columns.
    middle = (row == _middle(band, bands, height))[..., None] & (column == _middle(cell, inside, width))
    return (before[..., None] + cell).flatten(1), (middle & (count > 0)[..., None]).flatten(1)


def _middle(part: Tensor, parts: Tensor, size: int) -> Tensor:
    """Middle index of a part when `size` places are cut into `parts`: place i belongs to part i * parts // size."""
    start = (part * size + parts - 1) // parts
    end = ((part + 1) * size + parts - 1) // parts
    return (start + end - 1) // 2


def sample_cells(tokens: VisualTokens, quotas: Sequence[int]) -> Selection:
    """Keep `quotas[f]` tokens, evenly spaced over the grid, of frame f of the clip."""
    # Quotas count over the clip; these are the frames of this chunk.
    here = quotas[tokens.first_frame : tokens.first_frame + tokens.frames]
    _, middle = grid_cells(tokens.height, tokens.width, torch.tensor(here, device=tokens.features.device))
    return Selection(keep=true_indices(middle.flatten().expand(len(tokens.features), -1), sum(here)))
