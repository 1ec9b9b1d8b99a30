"""Methods that prune before the language model against vectors recorded from their published code."""

from __future__ import annotations

from torch import Tensor

from tests.vitcop.reference_checks import Case, Check, same_indices
from vitcop.methods.evs import evs_scores
from vitcop.selection import top_k_in_order


def evs(case: Case) -> list[str]:
    frames = _frames(case)
    count = max(frames.shape[2], int(frames.shape[1] * frames.shape[2] * (1 - float(case["q"]))))
    keep = top_k_in_order(evs_scores(frames).flatten(1), count)[0]
    return _differing(
        n_retained=count == int(case["n_retained"]),
        kept=same_indices(keep, case["kept"]),
        per_frame=same_indices(_per_frame(keep, frames), case["per_frame"]),
    )


def _frames(case: Case) -> Tensor:
    """The case's features as one clip (1, T, N, C)."""
    count = int(case["thw"][0])
    return case["video_embeds"].unflatten(0, (count, -1))[None]


def _per_frame(keep: Tensor, frames: Tensor) -> Tensor:
    return (keep // frames.shape[2]).bincount(minlength=frames.shape[1])


def _differing(**equal: bool) -> list[str]:
    return [name for name, same in equal.items() if not same]


CHECKS: dict[str, Check] = {"evs": evs}
