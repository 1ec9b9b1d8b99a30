"""ViTCoP for video: its budget, its selection against loops written from the formulas, and what could mislead it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.embedded.scenes import render, sample_scene
from pipeline.model.load import load_model
from tests.vitcop.models import build, make_inputs
from vitcop import prune
from vitcop.budget import Geometry
from vitcop.errors import UnreachableBudgetError
from vitcop.families import family_of
from vitcop.methods import ViTCoPVideo
from vitcop.ops import importance as importance_module
from vitcop.ops.importance import find_scenes, importance, outlier_scale
from vitcop.selection import apply_selection
from vitcop.tokens import LayerTokens, Needs, VisualTokens

EMBEDDED = Geometry(num_layers=8, frames=8, height=6, width=6)
RATIOS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 0.9, 0.99)


# -- budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "stages", "mean"),
    [
        (0.5, (216, 144, 72), 144),
        (0.25, (108, 72, 36), 72),
        (0.15, (65, 43, 22), 43.25),
        (0.1, (43, 29, 14), 28.75),
        (0.05, (23, 14, 7), 14.5),
        (0.02, (8, 6, 3), 5.75),
    ],
)
def test_the_counts_are_those_of_the_design(ratio: float, stages: tuple[int, ...], mean: float) -> None:
    plan = ViTCoPVideo(retention_ratio=ratio).plan(EMBEDDED)
    counts = plan.per_layer(8)
    assert sum(counts) / 8 == mean
    assert (counts[0], counts[2], counts[6]) == stages and list(plan.layers) == [2, 6]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 7, 8, 24, 28, 32, 36, 48])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_mean_over_layers_meets_the_ratio_and_counts_never_rise(ratio: float, num_layers: int) -> None:
    geometry = Geometry(num_layers=num_layers, frames=32, height=14, width=14)
    counts = ViTCoPVideo(retention_ratio=ratio).plan(geometry).per_layer(num_layers)
    assert abs(sum(counts) / num_layers - ratio * geometry.num_tokens) <= 0.5
    assert list(counts) == sorted(counts, reverse=True) and counts[0] <= geometry.num_tokens and counts[-1] >= 1


def test_two_layers_have_no_deep_stage() -> None:
    plan = ViTCoPVideo(retention_ratio=0.5).plan(replace(EMBEDDED, num_layers=2))
    assert plan.entering == 173 and dict(plan.layers) == {1: 115}


def test_less_than_a_token_is_refused_with_the_least_ratio() -> None:
    geometry = Geometry(num_layers=8, frames=1, height=5, width=5)
    with pytest.raises(UnreachableBudgetError, match=r"retention_ratio 0\.01 .* of 25 .* at least 0\.0400"):
        ViTCoPVideo(retention_ratio=0.01).plan(geometry)
    assert ViTCoPVideo(retention_ratio=0.04).plan(geometry).per_layer(8) == (1,) * 8


@pytest.mark.parametrize(
    "wrong", [{"motion": 1.5}, {"floor": 0.0}, {"entering_share": 0.5}, {"place_weight": -1.0}, {"deep_share": 2.0}]
)
def test_settings_out_of_range_are_refused_by_value(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        ViTCoPVideo(retention_ratio=0.5, **wrong)


# -- the selection, from the formulas ----------------------------------------------------------------------------------


def reference_weights(x: np.ndarray) -> np.ndarray:
    """Importance (T, N) of tokens (T, N, D), token by token; one scene, no outliers."""
    frames, count, _ = x.shape
    y = x - x.reshape(-1, x.shape[-1]).mean(axis=0)
    spread = float(np.mean([np.dot(token, token) for frame in y for token in frame]))
    weights = np.empty((frames, count))
    for place in range(count):
        usual = y[:, place].mean(axis=0)
        steps = [np.sum((x[t, place] - x[t - 1, place]) ** 2) > 0.15 * 2 * spread for t in range(1, frames)]
        changes = [True, *steps, True]  # before each frame, and after the last
        for t in range(frames):
            salient = min(np.sum(y[t, place] ** 2) / spread, 2) / 2
            moving = min(np.sum((y[t, place] - usual) ** 2) / spread, 1)
            end = changes[t] or changes[t + 1]
            weights[t, place] = (0.1 + 0.45 * salient + 0.45 * moving) * (1 if end else 0.3)
    return weights


def reference_points(features: np.ndarray, index: list[int], geometry: Geometry) -> np.ndarray:
    """Points (K, D + 3) of tokens (K, D)."""
    centred = features - features.mean(axis=0)
    rows = []
    for token, number in zip(centred, index, strict=True):
        frame, place = divmod(number, geometry.height * geometry.width)
        row, column = divmod(place, geometry.width)
        sides = [frame / geometry.frames, row / geometry.height, column / geometry.width]
        rows.append(np.concatenate([token / np.linalg.norm(token), sides]))
    return np.stack(rows)


def reference_choice(points: np.ndarray, weights: np.ndarray, count: int) -> list[int]:
    nearest = (points**2).sum(axis=1)
    chosen: list[int] = []
    for step in range(count):
        scores = [-1.0 if j in chosen else weights[j] * nearest[j] for j in range(len(points))]
        chosen.append(int(np.argmax(scores)))
        away = ((points - points[chosen[-1]]) ** 2).sum(axis=1)
        nearest = away if step == 0 else np.minimum(nearest, away)
    return sorted(chosen)


def check_against_loops(tokens: VisualTokens, geometry: Geometry, ratio: float) -> None:
    method = ViTCoPVideo(retention_ratio=ratio)
    plan = method.plan(geometry)
    selection = method.select_frames(tokens, plan, geometry)
    assert selection.merge_into is not None
    merged = apply_selection(selection, tokens.features.flatten(1, 2))
    for row, features in enumerate(tokens.features.double().numpy()):
        weights, flat = reference_weights(features).ravel(), features.reshape(-1, features.shape[-1])
        points = reference_points(flat, list(range(len(flat))), geometry)
        keep = reference_choice(points, weights, plan.entering)
        assert selection.keep[row].tolist() == keep
        away = ((points[:, None] - points[keep][None]) ** 2).sum(axis=2)
        slots = away.argmin(axis=1)
        slots[keep] = np.arange(len(keep))
        assert selection.merge_into[row].tolist() == slots.tolist()
        means = np.stack([flat[slots == slot].mean(axis=0) for slot in range(len(keep))])
        np.testing.assert_allclose(merged[row].numpy(), means, atol=1e-5)
        for layer, count in plan.layers.items():
            hidden = np.random.default_rng(layer).normal(size=(len(keep), 16))
            chosen = reference_choice(reference_points(hidden, keep, geometry), weights[keep], count)
            seen = layer_tokens(layer, torch.tensor(hidden).float()[None], keep, torch.tensor(weights[keep])[None])
            assert method.select_layer(seen, plan, geometry).keep[0].tolist() == chosen


def layer_tokens(layer: int, hidden: Tensor, index: list[int], labels: Tensor) -> LayerTokens:
    """The part of a layer's input that the method reads; nothing stands where it does not look."""
    unread: dict[str, Any] = {field.name: None for field in fields(LayerTokens)}
    read = {"layer": layer, "hidden": hidden, "visual": torch.arange(len(index))[None], "index": torch.tensor([index])}
    return LayerTokens(**(unread | read | {"labels": labels.float()}))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.4])
def test_random_tokens_are_chosen_as_by_loops(ratio: float, seed: int) -> None:
    geometry = Geometry(num_layers=5, frames=6, height=3, width=4)
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(2, 1, 12, 20, generator=generator)
    features = still + 0.4 * torch.randn(2, 6, 12, 20, generator=generator)
    check_against_loops(VisualTokens(features=features, height=3, width=4), geometry, ratio)


@pytest.fixture(scope="module")
def embedded_tokens() -> VisualTokens:
    """What the embedded model's tower makes of three held-out scenes."""
    loaded = load_model()
    clips = []
    for seed in (11, 12, 13):
        scene = sample_scene(np.random.default_rng((1_000_003, seed)))
        frames, _ = render(scene, (np.arange(8) + 0.5) / 8, 96)
        frames = frames + np.random.default_rng(seed).normal(0, 3, frames.shape)  # without noise, tokens would be equal
        pictures = torch.from_numpy(np.round(frames).clip(0, 255).astype(np.uint8))
        inputs = loaded.frame_processor.to_model_inputs(pictures, np.arange(8) / 2)
        (chunk,) = family_of(loaded.model).encode(inputs, EMBEDDED, Needs(), 8)
        clips.append(chunk)
    return replace(clips[0], features=torch.cat([clip.features for clip in clips]))


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.25])
def test_the_embedded_models_clips_are_chosen_as_by_loops(embedded_tokens: VisualTokens, ratio: float) -> None:
    check_against_loops(embedded_tokens, EMBEDDED, ratio)


def test_a_choice_in_a_model_stays_the_same_with_another_question_and_in_a_batch() -> None:
    model, method = build("qwen2_5_vl"), ViTCoPVideo(retention_ratio=0.3)
    both = make_inputs("qwen2_5_vl", (5, 9))
    with torch.no_grad(), prune(model, method) as stats:
        model(**both)
        kept = stats.records[-1].kept_index
        other = both | {"input_ids": both["input_ids"].clone()}
        other["input_ids"][:, -3:] += 1
        model(**other)
    assert list(kept) == ["vision", "shallow", "deep"]
    for stage, index in stats.records[-1].kept_index.items():
        assert torch.equal(index, kept[stage])


# -- what could mislead it ---------------------------------------------------------------------------------------------


SCENE = Geometry(num_layers=8, frames=12, height=6, width=6)


def scene(frames: int = 12, dim: int = 32, seed: int = 0, cut: int | None = None, pan: bool = False) -> Tensor:
    """Tokens (1, F, 36, D): a textured ground, slight noise, and an object of one token that crosses the middle row.

    From frame `cut` on the ground is another one; with `pan` it moves by a column a frame.
    """
    generator = torch.Generator().manual_seed(seed)
    grounds = torch.randn(2, 6, 6, dim, generator=generator)
    mover = torch.randn(dim, generator=generator) * 1.2
    clip = torch.empty(1, frames, 6, 6, dim)
    for frame in range(frames):
        ground = grounds[int(cut is not None and frame >= cut)]
        clip[0, frame] = ground.roll(frame, dims=1) if pan else ground
        clip[0, frame, 3, frame * 6 // frames] = mover
    return (clip + 0.05 * torch.randn(clip.shape, generator=generator)).flatten(2, 3)


def movers(frames: int = 12) -> Tensor:
    """Numbers of the object's tokens within the clip."""
    frame = torch.arange(frames)
    return frame * 36 + 18 + frame * 6 // frames


def kept_movers(features: Tensor, ratio: float = 0.08, **settings: Any) -> int:
    geometry = replace(SCENE, frames=features.shape[1])
    method = ViTCoPVideo(retention_ratio=ratio, **settings)
    selection = method.select_frames(
        VisualTokens(features=features, height=6, width=6), method.plan(geometry), geometry
    )
    return int(torch.isin(selection.keep[0], movers(features.shape[1])).sum())


def weights_of(features: Tensor, scenes: bool = True) -> Tensor:
    weight = importance(features, outlier_scale(features), floor=0.1, motion=0.5, inside_run=0.3, scenes=scenes)
    return weight[0].flatten()


@pytest.fixture
def with_sinks() -> Tensor:
    """The scene with a register token, of length 50 times the others', at one to three places of every frame."""
    features, generator = scene(), torch.Generator().manual_seed(5)
    sink = (
        torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0) * 50 * features.norm(dim=-1).mean()
    )
    for frame in range(12):
        places = torch.randperm(18, generator=generator)[: 1 + frame % 3]
        features[0, frame, places] = sink * (1 + 0.1 * torch.randn(len(places), 1, generator=generator))
    return features


def test_sink_tokens_do_not_hide_what_moves(with_sinks: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be nearly all of the mean and of the spread, so that nothing else seems unusual."""
    clean, sunk = weights_of(scene()), weights_of(with_sinks)
    others = torch.ones(12 * 36, dtype=torch.bool)
    others[movers()] = False
    others &= outlier_scale(with_sinks)[0].flatten() == 1
    assert sunk[movers()].mean() > 2.5 * sunk[others].mean()
    assert abs(sunk[movers()].mean() - clean[movers()].mean()) < 0.1
    assert kept_movers(with_sinks) >= kept_movers(scene()) - 1

    monkeypatch.setattr(importance_module, "OUTLIER_LENGTH", float("inf"))
    assert weights_of(with_sinks)[movers()].mean() < 0.3


def test_sink_tokens_are_in_no_mean_but_their_own(with_sinks: Tensor) -> None:
    method, loud = ViTCoPVideo(retention_ratio=0.08), outlier_scale(with_sinks)[0].flatten() < 1
    tokens = VisualTokens(features=with_sinks, height=6, width=6)
    selection = method.select_frames(tokens, method.plan(SCENE), SCENE)
    assert selection.merge_into is not None and 12 <= loud.sum() <= 36
    merged, keep = apply_selection(selection, with_sinks.flatten(1, 2))[0], selection.keep[0]
    usual = with_sinks.norm(dim=-1).median()
    assert (merged.norm(dim=-1)[~loud[keep]] < 2 * usual).all()
    assert loud[keep].sum() <= 4, "a few places for what is the same everywhere"
    assert torch.equal(merged[loud[keep]], with_sinks.flatten(1, 2)[0, keep][loud[keep]])


def test_sinks_among_hidden_states_do_not_move_the_mean() -> None:
    """Farthest points of directions from a mean that a few tokens hold would all be alike."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 43, 16, generator=generator), torch.rand(1, 43, generator=generator) + 0.1
    method, index = ViTCoPVideo(retention_ratio=0.1), list(range(0, 258, 6))
    plan = method.plan(EMBEDDED)
    clean = method.select_layer(layer_tokens(2, hidden, index, weight), plan, EMBEDDED).keep
    sunk = hidden.clone()
    sunk[0, [5, 6]] *= 400
    kept = method.select_layer(layer_tokens(2, sunk, index, weight), plan, EMBEDDED).keep
    assert len(set(clean[0].tolist()) & set(kept[0].tolist())) >= 27


def test_a_cut_does_not_make_everything_moving() -> None:
    """Over the whole clip, what a place usually shows is half of one scene and half of the other."""
    features = scene(cut=6)
    still = torch.ones(12 * 36, dtype=torch.bool)
    still[movers()] = False
    scenes, whole = (weights_of(features, scenes=split) for split in (True, False))
    assert scenes[movers()].mean() / scenes[still].mean() > 1.25 * whole[movers()].mean() / whole[still].mean()
    assert kept_movers(features) >= kept_movers(features, scenes=False)


@pytest.mark.parametrize(("frames", "cut"), [(12, 4), (12, 6), (40, 33)])
def test_a_cut_is_found_where_it_is(frames: int, cut: int) -> None:
    (first,) = scenes_of(scene(frames, cut=cut))
    assert first == [0] * cut + [cut] * (frames - cut)


def scenes_of(features: Tensor) -> list[list[int]]:
    """Number of the first frame of each frame's scene."""
    centred = features - features.mean(dim=(1, 2), keepdim=True)
    spread = centred.square().sum(dim=-1).mean(dim=(1, 2), keepdim=True)
    return find_scenes(features.diff(dim=1).square().sum(dim=-1) / (2 * spread)).first.tolist()


def test_neither_a_pan_nor_a_flash_nor_noise_is_a_cut() -> None:
    flash = scene()
    flash[:, 5] = torch.randn(36, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 12, 36, 32, generator=torch.Generator().manual_seed(2))
    for features in (scene(), scene(pan=True), flash, noise, scene()[:, :1], scene()[:, :2]):
        assert scenes_of(features) == [[0] * features.shape[1]]


def test_under_a_pan_importance_is_flat_and_the_choice_is_one_of_diversity() -> None:
    """Everything moves, so that only distance decides: no part of the clip is left out."""
    features = scene(pan=True)
    weights = weights_of(features)
    assert weights.max() < 3 * weights.min() and weights_of(scene()).max() > 6 * weights_of(scene()).min()
    method = ViTCoPVideo(retention_ratio=0.15)
    tokens = VisualTokens(features=features, height=6, width=6)
    keep = method.select_frames(tokens, method.plan(SCENE), SCENE).keep[0]
    flat = torch.nn.functional.normalize(features.flatten(1, 2)[0], dim=-1)
    covered = torch.cdist(flat, flat[keep]).amin(dim=1).mean()
    random = [torch.randperm(len(flat), generator=torch.Generator().manual_seed(s))[: len(keep)] for s in range(5)]
    assert all(covered < torch.cdist(flat, flat[other]).amin(dim=1).mean() for other in random)
    assert len(set((keep // 36).tolist())) >= 9


def test_less_motion_keeps_more_of_what_stands_still() -> None:
    """A detailed, still object beside one that moves: `motion` decides which of them the budget goes to."""
    features, detail = scene(), [0, 1, 6, 7]
    generator = torch.Generator().manual_seed(9)
    features[:, :, detail] = 1.5 * torch.randn(1, 1, 4, 32, generator=generator)
    still, moving = (weights_of_motion(features, motion) for motion in (0.2, 0.9))
    where = torch.tensor([frame * 36 + place for frame in range(12) for place in detail])
    assert still[where].sum() / still[movers()].sum() > 2 * moving[where].sum() / moving[movers()].sum()
    kept = {motion: kept_of(features, where, motion) for motion in (0.2, 0.9)}
    assert kept[0.2] > kept[0.9]


def weights_of_motion(features: Tensor, motion: float) -> Tensor:
    weight = importance(features, outlier_scale(features), floor=0.1, motion=motion, inside_run=0.3, scenes=True)
    return weight[0].flatten()


def kept_of(features: Tensor, where: Tensor, motion: float) -> int:
    method = ViTCoPVideo(retention_ratio=0.06, motion=motion)
    tokens = VisualTokens(features=features, height=6, width=6)
    return int(torch.isin(method.select_frames(tokens, method.plan(SCENE), SCENE).keep[0], where).sum())


def test_a_long_clip_is_pruned_in_windows_that_all_get_their_share() -> None:
    geometry = Geometry(num_layers=8, frames=256, height=6, width=6)
    features = scene(256)
    method = ViTCoPVideo(retention_ratio=0.05)
    plan = method.plan(geometry)
    keep = method.select_frames(VisualTokens(features=features, height=6, width=6), plan, geometry).keep[0]
    per_window = (keep // (geometry.num_tokens // 3)).bincount(minlength=3)
    assert len(keep) == plan.entering and per_window.max() - per_window.min() <= 1
    assert len(set(find_scenes(features.new_zeros(1, 255, 36)).first[0].tolist())) == 4
