"""Sharing a budget out over clusters, and merging what a cluster does not keep."""

from __future__ import annotations

import torch
from torch import Tensor

from vitcop.ops.quotas import rank
from vitcop.selection import MergeRule, Selection, true_indices


def select_in_clusters(
    saliency: Tensor, labels: Tensor, clusters: int, count: int, merge: MergeRule = "authors"
) -> Selection:
    """Keep `count` of V tokens (ViTCoP's stage II): a share for each cluster, the rest of a cluster merged into one.

    With more clusters than `count`, the count - 1 clusters of highest summed saliency become one token each, and all
    others together one more. Otherwise each cluster gets one merged token, and the remaining `count - clusters`
    tokens are shared out in proportion to (size - 1), rounded; what rounding leaves over goes to, or comes from,
    the clusters in order of their summed saliency. A merged token stands at the middle member of its group.

    Args:
        saliency: (B, V), higher is more salient. The paper's is the negative key norm.
        labels: (B, V) cluster of each token, in [0, clusters), none empty.
        count: tokens to keep, 1 <= count <= V.
    """
    # (B, C) summed saliency of each cluster
    total = torch.zeros(len(labels), clusters, device=saliency.device).scatter_add_(1, labels, saliency.float())
    if clusters > count:
        labels, clusters = _fold(labels, total, count), count
        total = torch.zeros_like(total[:, :count])
    sizes = torch.zeros_like(total).scatter_add_(1, labels, torch.ones_like(saliency, dtype=total.dtype)).long()
    # A cluster keeps its `quota` best tokens as they are; all its other tokens become one, at their middle.
    quota = _quotas(sizes, total, count)
    chosen = _rank_in_cluster(saliency, labels, sizes) < quota.gather(1, labels)
    middle = _middle_of_rest(chosen, labels, sizes - quota)
    mask = chosen.scatter(1, middle, True)
    # (B, V) place among the kept tokens of the merged token of each token's cluster
    slot = (mask.long().cumsum(1) - 1).gather(1, middle).gather(1, labels)
    return Selection(keep=true_indices(mask, count), merge_into=torch.where(chosen, -1, slot), merge=merge)


def _fold(labels: Tensor, total: Tensor, count: int) -> Tensor:
    """Relabel so that the count - 1 clusters of highest `total` stand alone and all others share the last label."""
    return rank(total).clamp(max=count - 1).gather(1, labels)


def _quotas(sizes: Tensor, total: Tensor, count: int) -> Tensor:
    """Tokens (B, C) that each cluster keeps beside its merged one; they add up to count - C."""
    clusters = sizes.shape[1]
    most = sizes - 1
    # (B, C) part of the count - C free tokens, in proportion to how many of its own a cluster could keep
    share = most.float() / most.sum(dim=1, keepdim=True).clamp(min=1)
    quota = torch.minimum((share * (count - clusters)).round().long(), most)
    # What rounding leaves over goes to the most salient clusters; what it took too much comes from the least.
    missing = count - clusters - quota.sum(dim=1, keepdim=True)
    rising = _first_in_order(quota < most, total, missing)
    falling = _first_in_order(quota > 0, -total, -missing)
    return quota + rising.long() - falling.long()


def _first_in_order(able: Tensor, score: Tensor, number: Tensor) -> Tensor:
    """Mask (B, C) of the first `number` (B, 1) able clusters by falling score."""
    return able & (rank(score.masked_fill(~able, float("-inf"))) < number)


def _rank_in_cluster(saliency: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Place (B, V) of each token within its cluster by falling saliency, from 0."""
    # A stable sort by label of what is sorted by saliency: clusters one after the other, each by falling saliency.
    by_saliency = saliency.argsort(dim=1, descending=True, stable=True)
    order = by_saliency.gather(1, labels.gather(1, by_saliency).argsort(dim=1, stable=True))
    start = (sizes.cumsum(1) - sizes).gather(1, labels)
    place = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return torch.empty_like(labels).scatter_(1, order, place) - start


def _middle_of_rest(chosen: Tensor, labels: Tensor, rest: Tensor) -> Tensor:
    """Index (B, C) of the middle one, by position, of each cluster's `rest` (B, C) tokens that were not chosen."""
    order = torch.where(chosen, rest.shape[1], labels).argsort(dim=1, stable=True)
    return order.gather(1, rest.cumsum(1) - rest + rest // 2)
