"""SimpleCluster (arXiv 2609.35394): k-means over all tokens of a clip, aware of where and when they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.methods.base import Proportional
from vitcop.methods.before import BeforeModel
from vitcop.ops.quotas import meet_count
from vitcop.ops.rotation import BASE, ST_BASE, rotate_by_position
from vitcop.ops.similarity import farthest_directions, unit
from vitcop.selection import Selection, true_indices
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class KMeans(Proportional, BeforeModel):
    """Cluster the clip's tokens by cosine k-means and keep the mean of each cluster.

    Clusters are found on features turned by a rotary encoding of (frame, row, column), a third of the channels for
    each; the mean is that of the features as they were. Centres start at tokens far from each other. The merged token
    stands where its cluster's first member stood. Question-blind, needs no attention.

    Deviations: an empty cluster is given the token farthest from its centre once, at the end, not in every iteration;
    the start is the first token (among unit vectors the published largest norm is a matter of rounding); always
    `iterations` of them, without a test of convergence, which would wait for the device.

    Attributes:
        iterations: of k-means.
        st_rope: rows and columns turn by the larger angles of Tango's ST-RoPE.
    """

    name: ClassVar[str] = "kmeans"

    iterations: int = 10
    st_rope: bool = False

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        base = ST_BASE if self.st_rope else BASE
        rotated = rotate_by_position(tokens.features, tokens.height, tokens.width, base)
        points = unit(rotated).flatten(1, 2)
        return cluster_selection(*cluster(points, plan.entering, self.iterations), plan.entering)


def cluster(points: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Cosine k-means of unit vectors (B, V, D) -> cluster (B, V) of each and cosine (B, V) with its centre."""
    # (B, count) tokens far from each other
    start = farthest_directions(points, count, first=torch.zeros_like(points[:, 0, 0], dtype=torch.long))
    centres = points.gather(1, start[..., None].expand(-1, -1, points.shape[-1]))
    for _ in range(iterations):
        label = (points @ centres.transpose(1, 2)).argmax(dim=2)
        # (B, V, count) who is in which cluster; a product with it adds up in the same order every time
        member = label[..., None] == torch.arange(count, device=label.device)
        total = member.transpose(1, 2).to(points.dtype) @ points
        centres = torch.where(member.any(dim=1)[..., None], unit(total), centres)
    best = (points @ centres.transpose(1, 2)).max(dim=2)
    return best.indices, best.values


def cluster_selection(label: Tensor, likeness: Tensor, count: int) -> Selection:
    """Merge clusters into means at their first members; tokens least like their centre stand in for empty clusters.

    Args:
        label: (B, V) in [0, count).
        likeness: (B, V) of each token with its cluster's centre.
    """
    place = torch.arange(label.shape[1], device=label.device).expand_as(label)
    # (B, count) first member of each cluster; V where a cluster is empty
    first = torch.full_like(label[:, :count], label.shape[1]).scatter_reduce(1, label, place, "amin")
    # (B, V) True at the first member of its cluster
    leads = place == first.gather(1, label)
    # Exactly `count`: tokens least like their centre take the places of empty clusters.
    kept = meet_count(leads, -likeness, count)
    slot = kept.long().cumsum(dim=1) - 1
    # A token kept for an empty cluster stands for itself alone, all others for their cluster.
    lead = torch.where(kept, place, first.gather(1, label))
    return Selection(keep=true_indices(kept, count), merge_into=slot.gather(1, lead))
