"""Runs of consecutive frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcop.ops.quotas import rank


@dataclass(frozen=True)
class Segments:
    """How clips of F frames fall into runs of consecutive frames; each frame knows its own run.

    Attributes:
        first, last: (B, F) number of the first and the last frame of the run that a frame is in.
    """

    first: Tensor
    last: Tensor

    @classmethod
    def from_starts(cls, starts: Tensor) -> Segments:
        """The runs that begin at the True frames of `starts` (B, F); the first frame always begins one."""
        frames = starts.shape[1]
        frame = torch.arange(frames, device=starts.device).expand_as(starts)
        # A run ends where the next one begins, and at the last frame.
        ends = starts.roll(-1, dims=1)
        ends[:, -1] = True
        # Each frame takes the nearest end at or after it: a running minimum from behind.
        last = torch.where(ends, frame, frames).flip(1).cummin(dim=1).values.flip(1)
        return cls(torch.where(starts, frame, 0).cummax(dim=1).values, last)

    @property
    def length(self) -> Tensor:
        """(B, F) frames in each frame's run."""
        return self.last - self.first + 1

    @property
    def place(self) -> Tensor:
        """(B, F) place of each frame in its run, from 0."""
        return torch.arange(self.first.shape[1], device=self.first.device) - self.first

    @property
    def same(self) -> Tensor:
        """(B, F, F) whether two frames are in the same run."""
        return self.first[:, :, None] == self.first[:, None]

    def sum(self, values: Tensor) -> Tensor:
        """Total of whole numbers (B, F) over each frame's run."""
        # Added up at the run's first frame, from where every frame reads it.
        return torch.zeros_like(values).scatter_add_(1, self.first, values).gather(1, self.first)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each frame's run: (B, F, ...) -> (B, F, ...), float32."""
        # (B, F, F) rows that average over the frames of the same run
        weight = self.same / self.length[..., None]
        return (weight @ values.float().flatten(2)).view_as(values)


def split_at_changes(similarity: Tensor, threshold: float, least: int) -> Segments:
    """Cut where similarity (B, F - 1) to the frame before is below `threshold`, and into at least `least` runs.

    What is missing is cut where similarity is lowest (DySeg, of FastVID and FlashVID). Runs are never empty: with
    fewer than `least` frames, each is a run of its own.
    """
    cut = (similarity < threshold) | (rank(-similarity) < least - 1)
    return Segments.from_starts(with_first_frame(cut))


def with_first_frame(changes: Tensor) -> Tensor:
    """Changes (B, F - 1, ...) of each frame to the one before, and True for the first one: (B, F, ...)."""
    return torch.cat([changes.new_ones(len(changes), 1, *changes.shape[2:]), changes], dim=1)
