"""ViTCoP's three stages against the authors' functions."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.vitcop.reference_checks import Case, close, same_indices
from vitcop.methods.staged import cluster_frames
from vitcop.ops.cluster_quotas import select_in_clusters
from vitcop.ops.scores import key_norm
from vitcop.selection import apply_selection, top_k_in_order


def vitcop(case: Case) -> list[str]:
    """Stages see the case second in a batch, so that a row which reads another's is noticed."""
    height, width = case["grid"].tolist()
    frames, kept = case["kept_indices"].shape
    prefix, count = int(case["prefix"]), int(case["shallow_tokens"])
    visual = slice(prefix, prefix + frames * kept)

    chosen = top_k_in_order(case["cls_attention"].sum(dim=1), kept)
    clusters = max(1, int(float(case["cluster_fraction"]) * kept))
    labels = cluster_frames(_batch(case["vision_keys"]), chosen.expand(2, -1, -1), height, width, clusters)
    norm = key_norm(_batch(case["shallow_keys"]))[:, visual]  # (2, V)
    flat = (labels + torch.arange(frames)[:, None] * clusters).flatten(1)
    shallow = select_in_clusters(-norm, flat, frames * clusters, count)
    hidden = case["hidden"]
    survivors = apply_selection(shallow, _batch(hidden, 0)[:, visual])[1]
    after = torch.cat([hidden[:prefix], survivors, hidden[visual.stop :]])
    whole = torch.arange(len(hidden))
    positions = torch.cat([whole[:prefix], shallow.keep[1] + prefix, whole[visual.stop :]])
    deep_norm = key_norm(_batch(case["deep_keys"]))[:, prefix : prefix + count]
    deep = top_k_in_order(-deep_norm, int(case["deep_tokens"]))[1] + prefix

    equal = {
        "kept_indices": same_indices(chosen, case["kept_indices"]),
        "cluster_labels": all(map(_same_partition, labels[1], case["cluster_labels"])),
        "shallow_key_norm": close(norm[1], case["shallow_key_norm"]),
        "selected": same_indices(
            _kept_as_they_are(shallow.keep, shallow.merge_into) + prefix, case["selected"].sort().values
        ),
        "positions_after_shallow": same_indices(positions, case["positions_after_shallow"]),
        "hidden_after_shallow": close(after, case["hidden_after_shallow"]),
        "deep_kept": same_indices(deep, case["deep_kept"]),
    }
    return [name for name, same in equal.items() if not same]


def _kept_as_they_are(keep: Tensor, merge_into: Tensor | None) -> Tensor:
    assert merge_into is not None
    return keep[1][merge_into[1, keep[1]] < 0]


def _batch(clip: Tensor, tokens: int = 1) -> Tensor:
    """Two rows: the clip with its tokens (a dimension of it) in reverse, and the clip itself."""
    return torch.stack([clip.flip(tokens), clip])


def _same_partition(ours: Tensor, theirs: Tensor) -> bool:
    """Same clusters, whatever their numbers: density peaks without a denser neighbour tie, and an unstable sort
    numbers them in the authors' code."""
    return bool(((ours[:, None] == ours) == (theirs[:, None] == theirs)).all())
