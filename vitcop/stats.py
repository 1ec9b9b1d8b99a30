"""Records of prefills: tokens kept, bytes cached, multiply-accumulates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

LATEST = 256
"""Prefills that a context remembers; each holds its clip's token numbers."""


@dataclass(frozen=True, kw_only=True)
class PrefillRecord:
    """One prefill with visual tokens; counts are for one row of the batch.

    Attributes:
        method: the method with all its settings.
        batch: rows.
        grid: frames, rows and columns of the clip's visual tokens before pruning.
        fixed: visual tokens beside the grid that can't be pruned (a CLS token a frame); part of all counts here.
        kept_per_layer: visual tokens that each layer of the language model saw.
        stages: visual tokens left after each stage, by name.
        prompt_tokens: other tokens of the prompt, padding and separators included.
        kv_bytes: bytes of keys and values in the cache after the prefill.
        macs_vision, macs_language: multiply-accumulates of vision tower with projector, and of the language model.
        kept_index: for each stage that pruned, (B, K) numbers of the grid's tokens it left, ascending; a token counts
            frame by frame in raster order before any pruning.
    """

    method: str
    batch: int
    grid: tuple[int, int, int]
    fixed: int = 0
    kept_per_layer: tuple[int, ...]
    stages: dict[str, int]
    prompt_tokens: int
    kv_bytes: int
    macs_vision: float
    macs_language: float
    kept_index: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __deepcopy__(self, memo: Mapping[int, object]) -> PrefillRecord:
        return self  # never changed, and copies of a cache are made for every question on a clip

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the clip before pruning."""
        frames, height, width = self.grid
        return frames * height * width + self.fixed

    @property
    def mean_kept(self) -> float:
        """Visual tokens kept, averaged over layers."""
        return sum(self.kept_per_layer) / len(self.kept_per_layer)

    @property
    def retention(self) -> float:
        """Fraction of visual tokens kept, averaged over layers; what `retention_ratio` asked for."""
        # Tokens that can't be pruned are in both counts.
        return self.mean_kept / self.visual_tokens


@dataclass
class PruneStats:
    """The prefills of one `prune` context, in order; of a long one, the latest."""

    records: deque[PrefillRecord] = field(default_factory=lambda: deque(maxlen=LATEST))

    @property
    def last(self) -> PrefillRecord | None:
        return self.records[-1] if self.records else None
