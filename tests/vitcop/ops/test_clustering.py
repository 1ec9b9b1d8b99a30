"""Density-peak clustering against a plain loop over tokens."""

import math

import pytest
import torch
from torch import Tensor

from vitcop.ops.clustering import density_peak_clusters, pairwise_distance, patch_positions


def plain_clusters(features: Tensor, positions: Tensor, clusters: int) -> list[int]:
    """One frame, token by token, as the method is defined."""
    points, places = features.double(), positions.double()
    count = len(points)
    distance = [[0.0 if i == j else math.sqrt(((points[i] - points[j]) ** 2).sum() + 1e-8) for j in range(count)]
                for i in range(count)]  # fmt: skip
    rho = [sum(math.exp(-((d / 8) ** 2)) for d in row) for row in distance]
    delta, parent = [], []
    for i in range(count):
        denser = [j for j in range(count) if rho[j] > rho[i] and (places[i] - places[j]).norm() <= 0.6]
        parent.append(min(denser, key=lambda j: distance[i][j], default=i))
        delta.append(distance[i][parent[i]] if denser else math.inf)
    order = sorted(range(count), key=lambda i: -delta[i] * rho[i])
    centres = order[:clusters]
    labels = []
    for i in range(count):
        at = i
        while at not in centres and parent[at] != at:
            at = parent[at]
        labels.append(centres.index(at if at in centres else min(centres, key=lambda c: distance[i][c])))
    return labels


@pytest.mark.parametrize("clusters", [1, 3, 9, 20])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_plain_loop_on_every_frame(seed: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = patch_positions(7, 6)
    chosen = torch.stack([torch.randperm(42, generator=generator)[:20].sort().values for _ in range(3)])
    features = torch.randn(3, 20, 12, generator=generator) * 3
    labels = density_peak_clusters(features, places[chosen], clusters)
    for frame in range(3):
        assert labels[frame].tolist() == plain_clusters(features[frame], places[chosen[frame]], clusters)


def test_every_label_is_used_and_none_is_missing() -> None:
    labels = density_peak_clusters(torch.randn(5, 30, 8), torch.rand(5, 30, 2), 7)
    assert all(frame.unique().tolist() == list(range(7)) for frame in labels)


def test_identical_tokens_form_no_cycle_and_get_a_label() -> None:
    labels = density_peak_clusters(torch.ones(2, 9, 4), patch_positions(3, 3).expand(2, -1, -1), 2)
    assert labels.min() == 0 and labels.max() == 1


def test_a_peak_that_reaches_no_centre_joins_the_nearest() -> None:
    # Three groups beyond the spatial cut-off of each other, one centre: two peaks are left without a link.
    positions = torch.tensor([[[0.0, 0.0], [0.0, 0.01], [0.9, 0.0], [0.9, 0.9]]])
    labels = density_peak_clusters(torch.randn(1, 4, 3), positions, 1)
    assert labels.tolist() == [[0, 0, 0, 0]]


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    points = torch.randn(2, 10, 16, dtype=torch.float64)
    exact = torch.cdist(points, points)
    ours = pairwise_distance((points + 1000).float())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
    assert not ours.diagonal(dim1=1, dim2=2).any()


def test_one_token_a_frame_is_its_own_cluster() -> None:
    assert density_peak_clusters(torch.randn(3, 1, 4), torch.zeros(3, 1, 2), 1).tolist() == [[0], [0], [0]]
