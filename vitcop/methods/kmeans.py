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
from vitcop.ops.similarity import farthest_directions, unit
from vitcop.selection import Selection, true_indices
from vitcop.tokens import VisualTokens

ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class KMeans(Proportional, BeforeModel):
    """Cluster the clip's tokens by cosine k-means and keep the mean of each cluster.

    Clusters are found on features turned by a rotary encoding of (frame, row, column), a third of the channels for
    each; the mean is that of the features as they were. Centres start at tokens far from each other. The merged token
    stands where its cluster's first member stood. Question-blind, needs no attention.

    Deviations: an empty cluster is given the token farthest from its centre once, at the end, not in every iteration;
    the start is the first token (among unit vectors the published largest norm is a matter of rounding); always
    `iterations` of them, without a test of convergence, which would wait for the device.
    """

    name: ClassVar[str] = "kmeans"

    iterations: int = 10

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        points = unit(rotate_by_position(tokens.features.float(), tokens.height, tokens.width)).flatten(1, 2)
        return cluster_selection(*cluster(points, plan.entering, self.iterations), plan.entering)


def rotate_by_position(features: Tensor, height: int, width: int) -> Tensor:
    """Rotary encoding of frame, row and column on features (B, F, N, D), a third of the channels each."""
    # The channels of frame, row and column; what does not divide by 3 goes to the frame.
    third, extra = divmod(features.shape[-1], 3)
    frame = torch.arange(features.shape[1], device=features.device)[:, None].expand(-1, height * width)
    place = torch.arange(height * width, device=features.device).expand_as(frame)
    parts = features.split([third + extra, third, third], dim=-1)
    positions = (frame, place // width, place % width)
    return torch.cat([_rotate(part, position) for part, position in zip(parts, positions, strict=True)], dim=-1)


def _rotate(features: Tensor, position: Tensor) -> Tensor:
    """Turn neighbouring channels of (..., D) by an angle that grows with the position (...); an odd last one stays."""
    pairs = features.shape[-1] // 2
    frequency = ROPE_BASE ** -(torch.arange(pairs, device=features.device) / max(pairs, 1))
    # (..., pairs), slower for later pairs
    angle = position[..., None] * frequency
    even, odd = features[..., 0 : 2 * pairs : 2], features[..., 1 : 2 * pairs : 2]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)
    return torch.cat([turned.flatten(-2), features[..., 2 * pairs :]], dim=-1)


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
