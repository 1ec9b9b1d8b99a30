"""Density-peak clustering of visual tokens, batched over frames, without host synchronisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DENSITY_CUTOFF = 8.0
SPATIAL_CUTOFF = 0.6


def patch_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Normalised positions (y / height, x / width) of a patch grid in raster order: (height * width, 2)."""
    y = torch.arange(height, device=device, dtype=torch.float32) / height
    x = torch.arange(width, device=device, dtype=torch.float32) / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2)


def pairwise_distance(points: Tensor) -> Tensor:
    """Euclidean distances (F, n, n) of points (F, n, d), zero on the diagonal.

    Points are centred first: the norms then are small against the distances, and the matrix form loses no digits.
    """
    points = points.float()
    points = points - points.mean(dim=1, keepdim=True)
    product = points @ points.transpose(1, 2)
    square = product.diagonal(dim1=1, dim2=2)
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, in place: (F, n, n) is the largest tensor here
    distance = (square[:, :, None] + square[:, None, :]).sub_(product, alpha=2)
    # Rounding can push small squares below 0; different points are at least 1e-4 apart.
    distance = distance.clamp_(min=0).add_(1e-8).sqrt_()
    return distance.diagonal_scatter(distance.new_zeros(distance.shape[:2]), dim1=1, dim2=2)


def density_peak_clusters(
    features: Tensor,
    positions: Tensor,
    num_clusters: int,
    density_cutoff: float = DENSITY_CUTOFF,
    spatial_cutoff: float = SPATIAL_CUTOFF,
) -> Tensor:
    """Cluster the tokens of each frame around density peaks (ViTCoP, visual information clustering).

    Density is `rho_i = sum_j exp(-(d_ij / cutoff)^2)`; `delta_i` is the distance to the nearest denser token among
    those within `spatial_cutoff` in normalised position; the `num_clusters` tokens of largest `rho * delta` are the
    centres, and every other token takes the label of its nearest denser token. Equal densities are ordered by index,
    so links never form a cycle; a token whose links end at no centre joins the centre nearest to it.

    Args:
        features: (F, n, d), F frames of n tokens.
        positions: (F, n, 2), normalised (y, x).
        num_clusters: centres a frame, 1 <= num_clusters <= n.

    Returns:
        (F, n) int64 labels from 0 to num_clusters - 1, in order of falling `rho * delta` of their centres.
    """
    frames, count, _ = features.shape
    # (F, n, n) distances and (F, n) densities
    distance = pairwise_distance(features)
    # (F, n) density, and (F, n, n) True where token j is denser than token i
    rho = (distance / density_cutoff).square_().neg_().exp_().sum(dim=-1)
    index = torch.arange(count, device=features.device)
    # denser[i, j]: j is denser than i; equal densities are ordered by index.
    denser = (rho[:, None, :] > rho[:, :, None]) | ((rho[:, None, :] == rho[:, :, None]) & (index < index[:, None]))
    # Only denser tokens nearby count; (F, n) distance to the nearest of them, infinite without one, and its index.
    linked = denser & (torch.cdist(positions.float(), positions.float()) <= spatial_cutoff)
    # (F, n) distance to the nearest denser token within reach, infinite where there is none
    delta, parent = distance.masked_fill(~linked, float("inf")).min(dim=-1)

    # (F, clusters); every other token has label -1 until it takes one over a link
    centres = (rho * delta).argsort(dim=-1, descending=True, stable=True)[:, :num_clusters]
    label = torch.full((frames, count), -1, dtype=torch.int64, device=features.device)
    label.scatter_(1, centres, torch.arange(num_clusters, device=features.device).expand(frames, -1))

    # A root is a centre or a token without a denser neighbour; doubling the links reaches it in log2(n) steps.
    parent = torch.where((label >= 0) | delta.isinf(), index, parent)
    for _ in range(max(1, math.ceil(math.log2(count))) if count > 1 else 0):
        parent = parent.gather(1, parent)
    # A root that is no centre leaves its tokens at -1; they join the nearest centre instead.
    label = label.gather(1, parent)
    # (F, n) nearest centre, for tokens whose links end at none
    nearest = distance.gather(2, centres[:, None, :].expand(-1, count, -1)).argmin(dim=-1)
    return torch.where(label >= 0, label, nearest)
