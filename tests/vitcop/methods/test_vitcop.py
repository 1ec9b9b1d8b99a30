"""ViTCoP's budget and its stages."""

from __future__ import annotations

import itertools

import pytest
import torch

from vitcop.budget import Geometry, Plan
from vitcop.errors import UnreachableBudgetError
from vitcop.methods.staged import cluster_frames
from vitcop.methods.vitcop import ViTCoP
from vitcop.tokens import VisualTokens


@pytest.mark.parametrize(("setting", "value"), [("key_source", "rotated"), ("key_score", "medium")])
def test_unknown_settings_are_named(setting: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        ViTCoP(retention_ratio=0.5, **{setting: value})


RATIOS = [0.01, 0.02, 0.05, 0.11, 1 / 9, 2 / 9, 0.25, 1 / 3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.99, 1.0]


def test_the_mean_over_layers_meets_the_ratio_and_counts_never_rise() -> None:
    for num_layers, ratio in itertools.product((4, 6, 8, 24, 28, 32, 36, 48), RATIOS):
        geometry = Geometry(num_layers=num_layers, frames=32, height=14, width=14)
        counts = ViTCoP(retention_ratio=ratio).plan(geometry).per_layer(num_layers)
        assert abs(sum(counts) / num_layers - ratio * geometry.num_tokens) <= 1, (num_layers, ratio)
        assert list(counts) == sorted(counts, reverse=True), (num_layers, ratio)
        assert counts[-1] >= 1


def test_every_layer_sees_no_fewer_tokens_at_a_higher_ratio() -> None:
    for num_layers in (8, 28, 32, 36):
        geometry = Geometry(num_layers=num_layers, frames=32, height=14, width=14)
        plans = [ViTCoP(retention_ratio=step / 100).plan(geometry) for step in range(1, 101)]
        counts = [plan.per_layer(num_layers) for plan in plans]
        for less, more in itertools.pairwise(counts):
            assert all(low <= high for low, high in zip(less, more, strict=True)), num_layers


@pytest.mark.parametrize(
    ("ratio", "entering", "shallow", "deep"),
    [(1 / 3, 288, 253, 51), (2 / 9, 230, 165, 33), (1 / 9, 172, 77, 15)],
)
def test_the_papers_settings_come_out(ratio: float, entering: int, shallow: int, deep: int) -> None:
    """LLaVA-1.5: 576 tokens, 32 layers. Counts as in the paper up to rounding; the deep one absorbs the remainder."""
    plan = ViTCoP(retention_ratio=ratio).plan(Geometry(num_layers=32, frames=1, height=24, width=24))
    assert plan.entering == pytest.approx(entering, abs=1)
    assert plan.layers[2] == pytest.approx(shallow, abs=1)
    assert plan.layers[22] == pytest.approx(deep, abs=1)


def test_less_than_a_token_is_refused() -> None:
    geometry = Geometry(num_layers=32, frames=1, height=2, width=2)
    with pytest.raises(UnreachableBudgetError, match=r"retention_ratio 0\.01"):
        ViTCoP(retention_ratio=0.01, vision_keep=1.0).plan(Geometry(num_layers=32, frames=8, height=4, width=4))
    assert ViTCoP(retention_ratio=0.25).plan(geometry).per_layer(32)[0] >= 1


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=str(ratio)):
        ViTCoP(retention_ratio=ratio)


@pytest.mark.parametrize("layers", [{"shallow_layer": 0}, {"deep_layer": 0}, {"shallow_layer": 5, "deep_layer": 5}])
def test_layers_that_cannot_be_are_refused(layers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"need 0 < shallow layer < deep layer <= 8"):
        ViTCoP(retention_ratio=0.5, **layers).plan(Geometry(num_layers=8, frames=8, height=5, width=6))


def visual_tokens(frames: int, first: int = 0, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.rand(2, 8, 30, size, generator=generator) for size in (6, 1, 5)]
    features, attention, keys = (part[:, first : first + frames] for part in whole)
    return VisualTokens(
        features=features, height=5, width=6, attention=attention[..., 0], keys=keys * 9, first_frame=first
    )


@pytest.mark.parametrize("ratio", [0.01, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_stage_one_in_chunks_equals_all_frames_at_once(ratio: float, chunk: int) -> None:
    method, geometry = ViTCoP(retention_ratio=ratio), Geometry(num_layers=8, frames=8, height=5, width=6)
    plan = method.plan(geometry)
    whole = method.select_frames(visual_tokens(8), plan, geometry)
    starts = range(0, 8, chunk)
    parts = [method.select_frames(visual_tokens(min(chunk, 8 - s), s), plan, geometry) for s in starts]
    keep = torch.cat([part.keep + start * 30 for part, start in zip(parts, starts, strict=True)], dim=1)
    labels = torch.cat([part.labels for part in parts if part.labels is not None], dim=1)
    assert whole.labels is not None
    assert torch.equal(keep, whole.keep) and torch.equal(labels, whole.labels)
    assert whole.keep.shape[1] == plan.entering


def test_fewer_tokens_than_frames_are_spread_evenly() -> None:
    geometry = Geometry(num_layers=8, frames=8, height=5, width=6)
    method = ViTCoP(retention_ratio=0.01)
    keep = method.select_frames(visual_tokens(8), Plan(entering=3), geometry).keep
    assert (keep // geometry.tokens_per_frame).tolist() == [[2, 5, 7]] * 2


def test_clusters_are_found_frame_by_frame() -> None:
    keys = torch.randn(1, 2, 30, 4) * 5
    kept = torch.arange(12).expand(1, 2, -1)
    both = cluster_frames(keys, kept, 5, 6, 3)
    assert torch.equal(both[:, :1], cluster_frames(keys[:, :1], kept[:, :1], 5, 6, 3))
