"""HoliTom (NeurIPS 2025, arXiv 2505.21334), outer stage: average what stands still, keep what is salient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.before import BeforeModel, required
from vitcop.ops.density import density_peaks, gather_members
from vitcop.ops.quotas import best_of_frame, keep_mask, meet_count
from vitcop.ops.segments import Segments, with_first_frame
from vitcop.ops.similarity import similarity_to_previous
from vitcop.selection import Selection
from vitcop.tokens import Needs, VisualTokens


@dataclass(frozen=True, kw_only=True)
class HoliTom(BeforeModel):
    """Cut the clip into windows that hold most static tokens; average those over time, then reduce by one ratio.

    A place is static in a window when each frame there is more like the one before than `threshold`. Windows maximise
    the tokens that averaging saves, by dynamic programming. The ratio that is left for the rest of the tokens goes to
    each frame's moving tokens, by attention, and to each window's averages, by density peaks (DPC-kNN); a centre
    becomes `beta` of itself and `1 - beta` of the mean of those nearest to it. Question-blind.

    Deviations: only the stage before the model, not the merging inside it; no contextual tokens among the moving ones
    (the authors' default share is 0, and others fail in their code); no noise on densities; the published counts, each
    rounded by itself, drift from the total, and the tokens of lowest attention are dropped, or those of next highest
    added, until it is exact. Positions are those of the tokens kept, an average's in the first frame of its window
    (the authors renumber them). Encoders without a CLS token give the mean attention received, as in the authors' code.

    Attributes:
        neighbours: of the density, at most as many as there are clusters.
        longest: most frames in a window.
    """

    name: ClassVar[str] = "holitom"
    needs: ClassVar[Needs] = Needs(attention=True)

    threshold: float = 0.8
    beta: float = 0.6
    neighbours: int = 7
    longest: int = 1024

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        attention = required(tokens.attention, "attention")
        static, moving, features = self.choose(tokens.features, attention, plan.entering / geometry.num_tokens)
        mask = meet_count((static | moving).flatten(1), attention.flatten(1), plan.entering)
        return keep_mask(mask, plan.entering, features.flatten(1, 2))

    def choose(self, features: Tensor, attention: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (B, F, N) of static and of moving tokens, about `ratio` of all, and features (B, F, N, D)."""
        # (B, F, N) True where a place stands still in its window
        windows, static = static_windows(similarity_to_previous(features), self.threshold, self.longest)
        ratios = ratio_after_averaging(windows, static, ratio)
        still = static.sum(dim=2)
        # (B, F) of each frame; averages are counted once a window, in its first frame
        moving_quota = ((static.shape[2] - still) * ratios).ceil().long()
        static_quota = torch.where(windows.place == 0, (still * ratios).round().long(), 0)
        moving = best_of_frame(attention.masked_fill(static, float("-inf")), moving_quota)
        centres, merged = self._merge_static(windows.mean(features), static, static_quota)
        return centres, moving, torch.where(centres[..., None], merged, features.float())

    def _merge_static(self, averages: Tensor, static: Tensor, quota: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (B, F, N) among the window averages (B, F, N, D), and the averages with their neighbours merged."""
        points = averages.flatten(0, 1)
        # (B * F, N) averages of windows that keep any, one group for each first frame
        free = (static & (quota > 0)[..., None]).flatten(0, 1)
        score, distance = density_peaks(points, free, quota.flatten(), self.neighbours)
        centres = best_of_frame(score.view_as(static), quota)
        flat = centres.flatten(0, 1)
        mean, count = gather_members(points, -distance, flat, free & ~flat)
        # A centre that nothing joined stays what it is.
        merged = torch.where(count[..., None] > 0, self.beta * points + (1 - self.beta) * mean, points)
        return centres, merged.view_as(averages)


def static_windows(similarity: Tensor, threshold: float, longest: int) -> tuple[Segments, Tensor]:
    """Windows that maximise the sum of static places times (length - 1), and the static mask (B, F, N) of each frame.

    Of equally good windows, a frame takes the shortest that ends with it.

    Args:
        similarity: (B, F - 1, N) of each token to the frame before.
    """
    changed = with_first_frame(similarity <= threshold)
    frame = torch.arange(changed.shape[1], device=changed.device)
    # (B, F, N) frame since which each place has not changed
    since = torch.where(changed, frame[:, None], 0).cummax(dim=1).values
    # (B, first, last) places that stand still from frame `first` to frame `last`
    static_places = (since[:, None] <= frame[:, None, None]).sum(dim=3)
    saved = static_places * (frame - frame[:, None]).clamp(min=0)  # (B, first, last)
    windows = Segments.from_starts(_best_windows(saved, longest))
    # Still at the window's end since its beginning, hence in all of its frames.
    until_end = since.gather(1, windows.last[..., None].expand_as(since))
    return windows, (until_end <= windows.first[..., None]) & (windows.length > 1)[..., None]


def _best_windows(saved: Tensor, longest: int) -> Tensor:
    """First frames (B, F) of the windows that add up to most of `saved` (B, first, last)."""
    frames = saved.shape[1]
    # total[t] is the most that windows of the first t frames save; begins[t] where the last of them begins.
    total, begins = [torch.zeros_like(saved[:, 0, 0])], []
    for last in range(frames):
        first = max(0, last + 1 - longest)
        value = torch.stack(total[first:], dim=1) + saved[:, first : last + 1, last]
        best = value.flip(1).max(dim=1)  # later beginnings come first, so that they win ties
        total.append(best.values)
        begins.append(last - best.indices)
    # Walk back from the last frame along the windows that were best.
    starts, end = torch.zeros_like(saved[:, 0]).bool(), torch.full_like(begins[0], frames - 1)
    for last in reversed(range(frames)):
        begin = torch.where(end == last, begins[last], frames)
        starts |= begin[:, None] == torch.arange(frames, device=saved.device)
        end = torch.where(end == last, begins[last] - 1, end)
    return starts


def ratio_after_averaging(windows: Segments, static: Tensor, ratio: float) -> Tensor:
    """(B, 1) float64: share to keep of the tokens that averaging leaves, so that `ratio` of all is kept, at most 1."""
    total = static[0].numel()
    # (B, 1) tokens that averaging saves: static places in all frames but a window's first
    averaged = (static.sum(dim=2) * (windows.place > 0)).sum(dim=1, keepdim=True)
    return (ratio / ((total - averaged).double() / total)).clamp(max=1)
