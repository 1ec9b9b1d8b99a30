"""Seconds by phase, and the most memory that was held: what an answer cost."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping

import torch


class PhaseClock:
    """Adds up seconds by phase, from the labels that `prune` calls it with when a phase ends.

    On a GPU it waits for the queued work, so that the work of a phase is counted in that phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.expect("generate")

    def expect(self, first_step: str) -> None:
        """Go on from now; the next forward without pixels ("step") is the phase `first_step`, later ones generate."""
        self._step, self._last = first_step, self._now()

    def __call__(self, label: str) -> None:
        # A forward without pixels is either the rest of the prompt, once after `expect`, or a decode step.
        if label == "step":
            label, self._step = self._step, "generate"
        now = self._now()
        self.seconds[label] += now - self._last
        self._last = now

    def take(self) -> Mapping[str, float]:
        """The seconds by phase since the last time."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Begin anew to look for the peak, where the device can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that was allocated since the reset; on a CPU the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The operating system keeps one peak a process, which can't be reset.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
