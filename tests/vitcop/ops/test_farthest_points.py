"""The greedy of weighted farthest points, against loops, in windows and within its memory."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitcop.ops import farthest_points as module
from vitcop.ops.farthest_points import farthest_points, nearest_point


def points(count: int, rows: int = 2, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count, dim, generator=generator), torch.rand(rows, count, generator=generator) + 0.1


def in_loops(points: Tensor, weight: Tensor, count: int) -> list[int]:
    """The definition, one pair of points at a time."""
    chosen: list[int] = []
    for _ in range(count):
        best, most = -1, -1.0
        for j in range(len(points)):
            far = min(
                (float((points[i] - points[j]).square().sum()) for i in chosen), default=float(points[j].square().sum())
            )
            if j not in chosen and float(weight[j]) * far > most:
                best, most = j, float(weight[j]) * far
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 9, 29, 30])
def test_the_greedy_equals_loops(count: int, seed: int) -> None:
    there, weight = points(30, seed=seed)
    kept = farthest_points(there, weight, count)
    for row in range(2):
        assert kept[row].tolist() == sorted(in_loops(there[row].double(), weight[row].double(), count))


def test_equal_points_are_chosen_once_each_from_the_lowest_index() -> None:
    there, weight = torch.ones(1, 6, 3), torch.ones(1, 6)
    assert farthest_points(there, weight, 4).tolist() == [[0, 1, 2, 3]]
    assert farthest_points(torch.zeros(1, 6, 3), weight, 6).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("length", [20, 21, 23, 24])
@pytest.mark.parametrize("window", [5, 8, 24])
def test_windows_give_equal_shares_and_choose_as_they_would_alone(length: int, window: int) -> None:
    there, weight = points(length)
    number = -(-length // window)
    bounds = [0]
    for run in range(number):
        bounds.append(bounds[-1] + length // number + (run < length % number))
    for count in range(1, length + 1):
        kept = farthest_points(there, weight, count, window)
        assert kept.shape == (2, count) and (kept.diff(dim=1) > 0).all() and kept.max() < length
        for run, (start, end) in enumerate(pairwise(bounds)):
            share = count // number + (run < count % number)
            mine = kept[0][(kept[0] >= start) & (kept[0] < end)]
            assert len(mine) == share
            if share:
                alone = farthest_points(there[:1, start:end], weight[:1, start:end], share)
                assert mine.tolist() == (alone[0] + start).tolist()


def test_rows_do_not_meet() -> None:
    there, weight = points(40, rows=3)
    together = farthest_points(there, weight, 12, window=15)
    for row in range(3):
        assert torch.equal(
            farthest_points(there[row : row + 1], weight[row : row + 1], 12, window=15)[0], together[row]
        )


def test_the_nearest_kept_point_is_found_and_a_kept_one_is_its_own() -> None:
    there, weight = points(40)
    there[:, 7] = there[:, 3]
    keep = farthest_points(there, weight, 39)
    slot = nearest_point(there, keep)
    centres = there.gather(1, keep[..., None].expand(-1, -1, 5))
    assert torch.equal(slot.gather(1, keep), torch.arange(39).expand(2, -1))
    others = nearest_point(there, keep[:, :6])
    away = torch.cdist(there, centres[:, :6])
    torch.testing.assert_close(away.gather(2, others[..., None])[..., 0], away.amin(dim=2), atol=1e-3, rtol=1e-3)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // max(1, tensor.element_size()))
        return made


def test_distances_of_many_windows_stay_within_the_memory_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    there, weight = points(2000, rows=1)
    whole = farthest_points(there, weight, 300, window=100), nearest_point(there, torch.arange(0, 2000, 10)[None])
    monkeypatch.setattr(module, "MATRIX_ELEMENTS", 30_000)
    with Largest() as largest:
        kept = farthest_points(there, weight, 300, window=100)
        slot = nearest_point(there, torch.arange(0, 2000, 10)[None])
    assert torch.equal(kept, whole[0]) and torch.equal(slot, whole[1])
    assert largest.elements <= 30_000
