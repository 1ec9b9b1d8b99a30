"""Tango against loops over segments and tokens, written from its formula; and the encoding of places it brings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitcop.budget import Geometry
from vitcop.methods import get_method
from vitcop.methods.tango import SINKS, Tango, without_sinks
from vitcop.ops.rotation import BASE, ST_BASE, rotate_by_position
from vitcop.selection import apply_selection
from vitcop.tokens import VisualTokens

GEOMETRY = Geometry(num_layers=8, frames=7, height=3, width=4)


def clip(seed: int, cuts: bool, rows: int = 2) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(rows, 3, 12, 18, generator=generator) + 2 * torch.randn(rows, 3, 1, 18, generator=generator)
    scene = torch.tensor([0, 0, 0, 1, 1, 2, 2]) * int(cuts)
    features = scenes[:, scene] + 0.4 * torch.randn(rows, 7, 12, 18, generator=generator)
    attention = torch.rand(rows, 7, 12, generator=generator)
    return VisualTokens(features=features, height=3, width=4, attention=attention)


def peaks(distance: Tensor, members: list[int], count: int) -> list[int]:
    """The `count` best centres among some tokens, by DPC-kNN with seven neighbours."""
    density = {}
    for i in members:
        near = sorted(float(distance[i, j]) for j in members)[:7]
        density[i] = math.exp(-sum(value**2 for value in near) / len(near))
    farthest = max(float(distance[i, j]) for i in members for j in members)
    score = {}
    for i in members:
        denser = [float(distance[i, j]) for j in members if density[j] > density[i]]
        score[i] = density[i] * min(denser, default=farthest)
    return sorted(members, key=lambda i: -score[i])[:count]


def in_loops(
    features: Tensor, attention: Tensor, rotated: Tensor, starts: list[int], ratio: float
) -> dict[int, Tensor]:
    """Tokens (V, D) that stay, by number; the total is not settled."""
    distance = torch.cdist(rotated.double(), rotated.double()) / rotated.shape[-1] ** 0.5
    kept: dict[int, Tensor] = {}
    for start, end in zip(starts, [*starts[1:], 7], strict=True):
        segment = list(range(start * 12, end * 12))
        total = math.ceil(len(segment) * ratio)
        context = int(total * 0.4)
        by_attention = sorted(segment, key=lambda i: -float(attention[i]))
        candidates = sorted(by_attention[: math.ceil(1.5 * (total - context))])
        centres = peaks(distance, candidates, total - context)
        salient = set()
        for centre in centres:
            cluster = [i for i in candidates if min(centres, key=lambda c: float(distance[i, c])) == centre]
            salient.add(max(cluster, key=lambda i: float(attention[i])))
        rest = [i for i in segment if i not in salient]
        anchors = peaks(distance, rest, context)
        kept |= {i: features[i] for i in salient}
        for anchor in anchors:
            others = [
                i for i in rest if i not in anchors and min(anchors, key=lambda a: float(distance[i, a])) == anchor
            ]
            weight = max(1 / (len(others) + 1), 0.6)
            mean = features[others].mean(dim=0) if others else features[anchor]
            kept[anchor] = weight * features[anchor] + (1 - weight) * mean
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("cuts", "starts"), [(True, [0, 3, 5]), (False, [0])])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_tango_equals_loops(ratio: float, cuts: bool, starts: list[int], seed: int) -> None:
    """At ratios whose counts a segment need not round, so that nothing is settled."""
    tokens, method = clip(seed, cuts), Tango(retention_ratio=ratio)
    assert tokens.attention is not None
    selection = method.select_frames(tokens, method.plan(GEOMETRY), GEOMETRY)
    found = apply_selection(selection, tokens.features.flatten(1, 2))
    rotated = rotate_by_position(tokens.features, 3, 4, ST_BASE).flatten(1, 2)
    for row in range(2):
        features, attention = tokens.features[row].flatten(0, 1), tokens.attention[row].flatten()
        kept = in_loops(features, attention, rotated[row], starts, ratio)
        assert selection.keep[row].tolist() == sorted(kept)
        torch.testing.assert_close(found[row], torch.stack([kept[i] for i in sorted(kept)]), atol=1e-5, rtol=1e-4)


def test_sinks_get_no_attention_on_their_own_grid_only() -> None:
    attention = torch.rand(2, 3, 196) + 0.1
    tokens = VisualTokens(features=torch.randn(2, 3, 196, 6), height=14, width=14)
    quiet = without_sinks(attention, tokens)
    assert (quiet == 0).nonzero()[:, 2].unique().tolist() == sorted(SINKS)
    other = VisualTokens(features=tokens.features, height=7, width=28)
    assert torch.equal(without_sinks(attention, other), attention)


def test_the_encoding_keeps_lengths_and_tells_places_apart() -> None:
    features = torch.randn(1, 4, 12, 20)
    rotated = rotate_by_position(features, 3, 4, ST_BASE)
    torch.testing.assert_close(rotated.norm(dim=-1), features.norm(dim=-1))
    torch.testing.assert_close(rotated[:, 0, 0], features[:, 0, 0])  # the origin stays
    same = features[:, :1, :1].expand(-1, 4, 12, -1)
    likeness = torch.cosine_similarity(rotate_by_position(same, 3, 4, ST_BASE), same[:, :1, :1], dim=-1)
    assert (likeness.flatten()[1:] < 0.9999).all()
    # A smaller base turns the slow channels of a row farther.
    slow = rotate_by_position(same, 3, 4, BASE)
    assert not torch.allclose(slow[0, 0, 4], rotate_by_position(same, 3, 4, ST_BASE)[0, 0, 4])
    torch.testing.assert_close(slow[0, 1, 0], rotate_by_position(same, 3, 4, ST_BASE)[0, 1, 0])


@pytest.mark.parametrize("name", ["kmeans", "divprune", "flashvid"])
def test_places_are_an_option_of_others(name: str) -> None:
    tokens, kept = clip(0, cuts=False), []
    for st_rope in (False, True):
        method = get_method(name)(retention_ratio=0.25, st_rope=st_rope)
        kept.append(method.select_frames(tokens, method.plan(GEOMETRY), GEOMETRY).keep)
    assert kept[0].shape == kept[1].shape and not torch.equal(*kept)
