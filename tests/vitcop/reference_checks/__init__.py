"""Comparisons with vectors recorded from published code, one function a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Case = Mapping[str, Tensor]
Check = Callable[[Case], list[str]]
"""Takes one case, returns the names of what differs."""


def load_cases(path: Path) -> Iterator[dict[str, Tensor]]:
    """The cases of a file whose keys are `NN/name`; float16 arrays come as float32."""
    with np.load(path) as arrays:
        names = sorted(arrays.files)
        for number in sorted({name.split("/")[0] for name in names}):
            yield {name.split("/", 1)[1]: _tensor(arrays[name]) for name in names if name.startswith(f"{number}/")}


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
