"""Comparisons with vectors recorded from published code, one function a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Case = Mapping[str, Tensor]
Check = Callable[[Case], list[str]]
"""Takes one case, returns the names of what differs."""


def load_cases(path: Path) -> dict[str, dict[str, Tensor]]:
    """The cases of a file whose keys are `NN/name`, by NN; float16 arrays come as float32."""
    cases: dict[str, dict[str, Tensor]] = {}
    with np.load(path) as arrays:
        for key in sorted(arrays):
            number, name = key.split("/", 1)
            cases.setdefault(number, {})[name] = _tensor(arrays[key])
    return cases


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def same_indices(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours == theirs).all())


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal within `tolerance` of the largest magnitude."""
    if ours.shape != theirs.shape:
        return False
    scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    return bool(((ours.float() - theirs.float()).abs() <= tolerance * scale).all())
