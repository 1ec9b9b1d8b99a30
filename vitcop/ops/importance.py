"""Importance of a clip's tokens: high where a token is unusual in the clip or at its place in the frame."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from vitcop.ops.segments import Segments, with_first_frame

SALIENT = 2.0
"""Squared distance from the clip's mean, in mean squared distances, from which a token is fully salient."""
CHANGED = 0.15
"""Squared change from frame to frame, in twice the mean squared distance, from which a place shows something else."""
CUT_CONTRAST = 2.0
"""Least change at a cut, in multiples of the change at the transitions before and after it."""
SCENE_FRAMES = 64
"""Longest scene; what a place usually shows is not asked over a longer time."""
OUTLIER_LENGTH = 8.0
"""Length of a token, in median lengths, from which it is an outlier (a register or sink token)."""
CHANNELS = 512
"""Channels of float32 copies that exist at a time."""


def outlier_scale(features: Tensor) -> Tensor:
    """Factors (...) that bring outliers among (B, ..., D) tokens to the clip's median length; 1 for all others."""
    length = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    # (B, 1, ..., 1) the clip's median length
    usual = length.flatten(1).median(dim=1).values.view(-1, *[1] * (length.dim() - 1))
    return torch.where(length > OUTLIER_LENGTH * usual, usual / length, 1.0)


def importance(
    features: Tensor, scale: Tensor, *, floor: float, motion: float, inside_run: float, scenes: bool
) -> Tensor:
    """Weights (B, F, N) in (0, 1] of tokens (B, F, N, D) times `scale` (B, F, N), see `outlier_scale`.

    With y the token less the clip's mean, and S the mean of |y|^2 over the clip: salient is |y|^2 / 2S, at most 1;
    moving is |y - mean of y at its place over the scene|^2 / S, at most 1; a place changes between two frames where
    |difference|^2 > 0.15 * 2S. The weight is `floor` and the rest shared by salient and moving, times `inside_run`
    where the place changes neither before nor after.
    """
    # (B, F, N) squared distance from the clip's mean, and (B, F - 1, N) squared change from frame to frame
    square, change = torch.zeros_like(scale), torch.zeros_like(scale[:, 1:])
    for tokens in _centred(features, scale):
        square += _square(tokens)
        change += _square(tokens[:, 1:] - tokens[:, :-1])
    # (B, 1, 1) the clip's mean of |y|^2, which all thresholds are measured in
    spread = square.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    change /= 2 * spread
    # A second pass, as scenes are known only once all changes are: distance from what the place shows in its scene.
    scene = find_scenes(change) if scenes else None
    # (B, F, N) squared distance from what the place shows over its scene
    away = torch.zeros_like(scale)
    for tokens in _centred(features, scale):
        away += _square(tokens - (scene.mean(tokens) if scene else tokens.mean(dim=1, keepdim=True)))

    # Salient in the clip, and moving at its place, each at most 1.
    weight = (1 - motion) * (square / (SALIENT * spread)).clamp(max=1) + motion * (away / spread).clamp(max=1)
    changed = with_first_frame(change > CHANGED)
    # A token inside a run of unchanged content changes neither before nor after.
    ends = changed | torch.cat([changed[:, 1:], torch.ones_like(changed[:, :1])], dim=1)
    return (floor + (1 - floor) * weight) * torch.where(ends, 1.0, inside_run)


def find_scenes(change: Tensor) -> Segments:
    """Scenes of clips by the change (B, F - 1, N) of each place between two frames, in twice the mean square.

    There is a cut where more than half of the places show something else, and change far more than in the transitions
    before and after, which motion of the camera and a flash do not. Very long clips are cut evenly as well.
    """
    usual = change.median(dim=2).values
    # A transition without neighbours on both sides is no cut: in a scene of one frame nothing moves.
    around = pad(usual, (1, 1), value=torch.inf)
    cut = (usual > CHANGED) & (usual > CUT_CONTRAST * torch.maximum(around[:, :-2], around[:, 2:]))
    frames = usual.shape[1] + 1
    # Number of the equal piece that each frame is in; a step in it is a cut.
    part = torch.arange(frames, device=usual.device) * -(-frames // SCENE_FRAMES) // frames
    return Segments.from_starts(with_first_frame(cut | (part.diff() > 0)))


def _centred(features: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """Tokens times `scale` less their mean over the clip, float32, some channels at a time."""
    for part in features.split(CHANNELS, dim=-1):
        tokens = part.float() * scale[..., None]
        yield tokens.sub_(tokens.mean(dim=(1, 2), keepdim=True))


def _square(tokens: Tensor) -> Tensor:
    return tokens.square().sum(dim=-1)
