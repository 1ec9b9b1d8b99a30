"""Profiles for tests, from made-up correlations."""

import torch

from vitcop.calibration import Profile
from vitcop.calibration.measure import summarize

NAMES = {"model": "tiny", "model_type": "llava_onevision", "frames": 4, "visual_tokens": 64}


def correlations(clips: int, layers: int, norm: float, distance: float) -> torch.Tensor:
    """Correlations (clips, 2, layers - 1) about the given means."""
    noise = 0.02 * torch.randn(clips, 2, layers - 1, generator=torch.Generator().manual_seed(1))
    return noise.double() + torch.tensor([norm, distance]).view(1, 2, 1)


def profile_of(layers: int = 5, norm: float = 0.4, distance: float = -0.1) -> Profile:
    return summarize(correlations(6, layers, norm, distance), **NAMES)
