"""What every method that chooses before the language model must keep to, over the whole registry."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vitcop.models import build, make_inputs
from vitcop import UnsupportedInputError, prune
from vitcop.budget import Geometry
from vitcop.errors import UnreachableBudgetError
from vitcop.families import family_of
from vitcop.families.llava_onevision import LlavaOnevision
from vitcop.methods import METHODS, Method, get_method
from vitcop.methods.downscale import small_grid
from vitcop.methods.flashvid import strong_links, sum_trees
from vitcop.methods.holitom import static_windows
from vitcop.methods.kmeans import cluster, cluster_selection
from vitcop.methods.prumerge import choose_centres, take_in_neighbours
from vitcop.methods.visionzip import merged_selection, visionzip_select
from vitcop.ops.segments import split_at_changes
from vitcop.ops.similarity import unit
from vitcop.selection import Selection, apply_selection
from vitcop.tokens import VisualTokens

NAMES = [name for name, method in METHODS.items() if method.select_frames is not Method.select_frames]
RATIOS = (0.95, 0.5, 0.25, 0.1, 0.05, 0.02)
GEOMETRIES = (
    Geometry(num_layers=8, frames=16, height=5, width=6),
    Geometry(num_layers=8, frames=8, height=7, width=4),
    Geometry(num_layers=8, frames=3, height=1, width=9),
    Geometry(num_layers=8, frames=1, height=6, width=6),
)


def clip(geometry: Geometry, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """A scene that changes slowly, with a cut in the middle."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frames, count = geometry.frames, geometry.tokens_per_frame
    cut = (torch.arange(frames) >= frames // 2).long()
    scene = normal(batch, 2, count, 24)[:, cut]
    features = scene + 0.3 * normal(batch, frames, count, 24) * (normal(batch, 1, count, 1) > 0)
    attention = normal(batch, frames, count).softmax(dim=-1)
    return VisualTokens(
        features=features.to(dtype),
        height=geometry.height,
        width=geometry.width,
        attention=attention,
        keys=(features @ normal(24, 12)).to(dtype),
    )


def part(tokens: VisualTokens, first: int, end: int, rows: slice = slice(None)) -> VisualTokens:
    assert tokens.attention is not None and tokens.keys is not None
    return VisualTokens(
        features=tokens.features[rows, first:end],
        height=tokens.height,
        width=tokens.width,
        attention=tokens.attention[rows, first:end],
        keys=tokens.keys[rows, first:end],
        first_frame=first,
    )


def tokens_of(selection: Selection, tokens: VisualTokens) -> Tensor:
    return apply_selection(selection, tokens.features.flatten(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_and_indices_are_sound(name: str) -> None:
    reached = 0
    for ratio, geometry in itertools.product(RATIOS, GEOMETRIES):
        method = get_method(name)(retention_ratio=ratio)
        try:
            plan = method.plan(geometry)
        except UnreachableBudgetError:
            continue
        reached += 1
        tokens = clip(plan.encoded(geometry))
        selection = method.select_frames(tokens, plan, geometry)
        if not method.fixed_budget:
            kept = sum(plan.per_layer(geometry.num_layers)) / geometry.num_layers
            assert abs(kept - ratio * geometry.num_tokens) <= 1, (ratio, geometry)
        assert selection.keep.shape == (2, plan.entering)
        assert (selection.keep.diff(dim=1) > 0).all()
        assert ((selection.keep >= 0) & (selection.keep < geometry.num_tokens)).all()
        features = tokens_of(selection, tokens)
        assert features.shape == (2, plan.entering, 24)
        assert features.isfinite().all(), (ratio, geometry)
    assert reached >= 6


@pytest.mark.parametrize("name", NAMES)
def test_the_same_clip_is_pruned_the_same_way_alone_and_in_a_batch(name: str) -> None:
    geometry = GEOMETRIES[0]
    method = get_method(name)(retention_ratio=0.25)
    plan = method.plan(geometry)
    tokens = clip(plan.encoded(geometry), batch=3)
    selection = method.select_frames(tokens, plan, geometry)
    again = method.select_frames(tokens, plan, geometry)
    assert torch.equal(selection.keep, again.keep)
    assert torch.equal(tokens_of(selection, tokens), tokens_of(again, tokens))
    for row in range(3):
        one = part(tokens, 0, geometry.frames, slice(row, row + 1))
        alone = method.select_frames(one, plan, geometry)
        assert torch.equal(alone.keep[0], selection.keep[row])
        torch.testing.assert_close(tokens_of(alone, one)[0], tokens_of(selection, tokens)[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].frame_local])
def test_frame_local_methods_do_not_mind_chunks(name: str) -> None:
    geometry = GEOMETRIES[0]
    method = get_method(name)(retention_ratio=0.0625)
    plan = method.plan(geometry)
    tokens = clip(plan.encoded(geometry))
    whole = method.select_frames(tokens, plan, geometry)
    chunks = [part(tokens, first, first + 5) for first in range(0, geometry.frames, 5)]
    selections = [method.select_frames(chunk, plan, geometry) for chunk in chunks]
    size = geometry.tokens_per_frame
    keep = [s.keep + c.first_frame * size for s, c in zip(selections, chunks, strict=True)]
    assert torch.equal(torch.cat(keep, dim=1), whole.keep)
    features = [tokens_of(s, c) for s, c in zip(selections, chunks, strict=True)]
    torch.testing.assert_close(torch.cat(features, dim=1), tokens_of(whole, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_a_still_clip_of_equal_tokens_is_no_trouble(name: str) -> None:
    geometry = GEOMETRIES[1]
    method = get_method(name)(retention_ratio=0.25)
    plan = method.plan(geometry)
    seen = plan.encoded(geometry)
    shape = (1, seen.frames, seen.tokens_per_frame)
    tokens = VisualTokens(
        features=torch.ones(*shape, 8, dtype=torch.bfloat16),
        height=seen.height,
        width=seen.width,
        attention=torch.full(shape, 1 / shape[-1]),
        keys=torch.zeros(*shape, 4, dtype=torch.bfloat16),
    )
    selection = method.select_frames(tokens, plan, geometry)
    assert selection.keep.shape == (1, plan.entering) and (selection.keep.diff(dim=1) > 0).all()
    features = tokens_of(selection, tokens)
    assert features.dtype == torch.bfloat16 and features.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait_for_the_device(name: str) -> None:
    """Tensors without values can't be read back, nor give shapes that depend on values."""
    geometry = GEOMETRIES[0]
    method = get_method(name)(retention_ratio=0.25)
    plan = method.plan(geometry)
    tokens = clip(plan.encoded(geometry))
    assert tokens.attention is not None and tokens.keys is not None
    valueless = replace(
        tokens,
        features=tokens.features.to("meta"),
        attention=tokens.attention.to("meta"),
        keys=tokens.keys.to("meta"),
    )
    assert method.select_frames(valueless, plan, geometry).keep.shape == (2, plan.entering)


def test_smaller_frames_are_refused_where_the_family_cannot_encode_them() -> None:
    model, inputs = build("qwen3_vl"), make_inputs("qwen3_vl")
    method = get_method("downscale")(retention_ratio=0.4)
    with prune(model, method), pytest.raises(UnsupportedInputError, match="can't encode smaller frames"):
        model(**inputs)


def test_floors_keep_what_they_keep() -> None:
    geometry = GEOMETRIES[0]
    for ratio in (0.05, 0.5):
        assert get_method("text_only")(retention_ratio=ratio).plan(geometry).entering == 0
        assert get_method("one_frame")(retention_ratio=ratio).plan(geometry).entering == geometry.tokens_per_frame
    with pytest.raises(ValueError, match="ignores retention_ratio"):
        get_method("one_frame")(retention_ratio=1.0)


def test_one_frame_is_the_middle_one() -> None:
    geometry = GEOMETRIES[0]
    method = get_method("one_frame")()
    keep = method.select_frames(clip(geometry), method.plan(geometry), geometry).keep
    assert (keep // geometry.tokens_per_frame == geometry.frames // 2).all()


@pytest.mark.parametrize(("name", "frames"), [("evs", 4), ("frame_subsample", 4)])
def test_less_than_a_frame_is_refused_where_frames_stay_whole(name: str, frames: int) -> None:
    geometry = Geometry(num_layers=8, frames=frames, height=4, width=4)
    with pytest.raises(UnreachableBudgetError, match=r"at least 0\.25"):
        get_method(name)(retention_ratio=0.2).plan(geometry)
    assert get_method(name)(retention_ratio=0.25).plan(geometry).entering == 16


def test_frame_subsample_keeps_whole_frames_and_part_of_one() -> None:
    geometry = Geometry(num_layers=8, frames=8, height=4, width=4)
    method = get_method("frame_subsample")(retention_ratio=0.3)
    keep = method.select_frames(clip(geometry), method.plan(geometry), geometry).keep[0]
    assert (keep // 16).bincount(minlength=8).tolist() == [0, 16, 0, 0, 16, 0, 6, 0]


def test_average_pool_keeps_the_mean_of_each_cell() -> None:
    geometry = Geometry(num_layers=8, frames=2, height=4, width=4)
    method, tokens = get_method("average_pool")(retention_ratio=0.25), clip(geometry)
    selection = method.select_frames(tokens, method.plan(geometry), geometry)
    grid = tokens.features.unflatten(2, (2, 2, 2, 2))
    torch.testing.assert_close(tokens_of(selection, tokens), grid.mean(dim=(3, 5)).flatten(1, 3))


def test_grid_spreads_tokens_evenly() -> None:
    geometry = Geometry(num_layers=8, frames=2, height=6, width=6)
    method = get_method("grid")(retention_ratio=9 / 36)
    keep = method.select_frames(clip(geometry), method.plan(geometry), geometry).keep[0]
    one = torch.tensor([0, 2, 4, 12, 14, 16, 24, 26, 28])
    assert torch.equal(keep, torch.cat([one, one + 36]))


def test_frames_shrink_to_a_grid_that_wastes_little() -> None:
    assert small_grid(49, 14, 14) == (7, 7)
    assert small_grid(98, 14, 14) == (10, 10)
    assert small_grid(15, 5, 6) == (4, 4)
    assert small_grid(1, 5, 6) == (1, 1)
    assert small_grid(30, 5, 6) == (5, 6)


def test_downscaled_tokens_stand_where_they_stood_and_cost_less() -> None:
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
    with torch.inference_mode(), prune(model, get_method("grid")(retention_ratio=0.25)) as stats:
        model(**inputs)
    full = stats.records[-1]
    with torch.inference_mode(), prune(model, get_method("downscale")(retention_ratio=0.25)) as stats:
        model(**inputs)
    small = stats.records[-1]
    assert small.mean_kept == full.mean_kept == 16
    assert small.macs_vision < full.macs_vision / 2 and small.macs_language == full.macs_language
    assert small.kept_index["vision"][0].tolist() == [
        frame * 16 + place for frame in range(4) for place in (5, 7, 13, 15)
    ]


def test_frames_of_full_size_are_encoded_as_the_model_encodes_them() -> None:
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
    family = family_of(model)
    assert isinstance(family, LlavaOnevision)
    frames = inputs["pixel_values_videos"]
    with torch.inference_mode():
        ours = family._small_tokens(frames, family.geometry(inputs))
        torch.testing.assert_close(ours, family.project(frames), atol=1e-5, rtol=1e-5)


def test_evs_keeps_the_first_frame_and_what_changes() -> None:
    geometry = Geometry(num_layers=8, frames=3, height=2, width=2)
    features = torch.ones(1, 3, 4, 2)
    features[0, 1, 2] = torch.tensor([1.0, -1.0])
    method = get_method("evs")(retention_ratio=0.5)
    tokens = VisualTokens(features=features, height=2, width=2)
    assert method.select_frames(tokens, method.plan(geometry), geometry).keep.tolist() == [[0, 1, 2, 3, 6, 10]]


def test_divprune_leaves_out_a_copy() -> None:
    features = torch.eye(4)[[0, 0, 1, 2]][None, None]
    geometry = Geometry(num_layers=8, frames=1, height=1, width=4)
    method = get_method("divprune")(retention_ratio=0.75)
    tokens = VisualTokens(features=features, height=1, width=4)
    keep = method.select_frames(tokens, method.plan(geometry), geometry).keep[0].tolist()
    assert len(set(keep) & {0, 1}) == 1 and {2, 3} <= set(keep)


def test_kmeans_finds_separate_clusters_and_keeps_their_means() -> None:
    centres = torch.eye(3, 8)
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([[0, 1, 2, 1, 0, 2, 2, 0, 1]])
    features = centres[label] + 0.05 * torch.randn(1, 9, 8, generator=generator)
    found, likeness = cluster(unit(features), 3, iterations=5)
    assert torch.equal(found[:, :, None] == found[:, None], label[:, :, None] == label[:, None])
    selection = cluster_selection(found, likeness, 3)
    assert selection.keep.tolist() == [[0, 1, 2]]
    means = torch.stack([features[0][label[0] == number].mean(dim=0) for number in range(3)])
    torch.testing.assert_close(apply_selection(selection, features)[0], means)


def test_an_empty_cluster_is_given_the_token_least_like_its_centre() -> None:
    label, likeness = torch.tensor([[0, 0, 0, 2, 2]]), torch.tensor([[1.0, 0.9, 0.2, 1.0, 0.5]])
    selection = cluster_selection(label, likeness, 3)
    assert selection.keep.tolist() == [[0, 2, 3]]
    assert selection.merge_into is not None and selection.merge_into.tolist() == [[0, 0, 1, 2, 2]]


def test_visionzip_adds_the_mean_of_what_joins() -> None:
    attention = torch.tensor([[[0.1, 0.5, 0.1, 0.1, 0.2]]])
    keys = torch.tensor([[[[1.0, 0.0], [1.0, 1.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]]])
    features = torch.arange(10.0).view(1, 5, 2)
    one, two = torch.tensor([1]), torch.tensor([2])
    dominant, target, joins = visionzip_select(attention, keys, one, two)
    selection = merged_selection(dominant | target, target, joins, 3)
    assert selection.keep.tolist() == [[0, 1, 3]]
    expected = torch.stack([features[0, 0] + features[0, 2], features[0, 1], features[0, 3] + features[0, 4]])
    torch.testing.assert_close(apply_selection(selection, features)[0], expected)


def test_prumerge_centres_are_salient_and_evenly_spaced() -> None:
    attention = torch.tensor([[[0.1, 0.9, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]]])
    centres = choose_centres(attention, torch.tensor([[5]]), 0.2)
    assert centres[0, 0].nonzero().flatten().tolist() == [1, 2, 4, 6, 8]


def test_prumerge_adds_neighbours_and_gathers_the_rest() -> None:
    keys = torch.tensor([[[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]]])
    features = torch.arange(8.0).view(1, 1, 4, 2)
    weight = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    centres = torch.tensor([[[True, False, False, True]]])
    merged, rest = take_in_neighbours(features, keys, weight, centres, neighbours=1)
    x = features[0, 0]
    expected = torch.stack([x[0] + 0.3 * x[1], x[1] + 0.4 * x[0], x[2] + 0.1 * x[3], x[3] + 0.2 * x[2]])
    torch.testing.assert_close(merged[0, 0], expected)
    torch.testing.assert_close(rest[0, 0], 0.3 * x[1] + 0.2 * x[2])


@pytest.mark.parametrize("longest", [2, 3, 6])
def test_holitom_windows_save_most_tokens(longest: int) -> None:
    similarity = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(0))
    windows, static = static_windows(similarity, threshold=0.4, longest=longest)
    for row in range(4):

        def saved(first: int, last: int, row: int = row) -> int:
            return int((similarity[row, first:last] > 0.4).all(dim=0).sum()) * (last - first)

        best = max(
            sum(saved(first, end - 1) for first, end in itertools.pairwise((0, *cuts, 6)))
            for count in range(6)
            for cuts in itertools.combinations(range(1, 6), count)
            if all(end - first <= longest for first, end in itertools.pairwise((0, *cuts, 6)))
        )
        assert int((static[row].sum(dim=1) * (windows.place[row] > 0)).sum()) == best
        assert int(windows.length[row].max()) <= longest


def test_holitom_averages_what_stands_still() -> None:
    geometry = Geometry(num_layers=8, frames=2, height=1, width=3)
    features = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[1.0, 0.1], [0.1, 1.0], [0.0, 1.0]]]])
    tokens = VisualTokens(features=features, height=1, width=3, attention=torch.tensor([[[0.3, 0.2, 0.1]] * 2]))
    method = get_method("holitom")(retention_ratio=4 / 6)
    selection = method.select_frames(tokens, method.plan(geometry), geometry)
    assert selection.keep.tolist() == [[0, 1, 2, 5]]
    expected = torch.tensor([[1.0, 0.05], [0.05, 1.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(tokens_of(selection, tokens)[0], expected)


def test_flashvid_trees_are_summed_from_the_end() -> None:
    features = torch.tensor([1.0, 2.0, 10.0, 20.0, 100.0, 200.0]).view(1, 3, 2, 1)
    linked = torch.tensor([[[False, False], [True, False], [True, True]]])
    parent = torch.tensor([[[0, 0], [1, 0], [0, 0]]])
    trees = sum_trees(features, linked, parent)
    # 100 and 200 join 10, which joins 2: one direct child, but all of the sum.
    assert trees[0, 0].flatten().tolist() == [1.0, (2 + 10 + 100 + 200) / 2]
    assert trees[0, 1, 1].item() == 20.0


def test_flashvid_links_the_strongest_where_there_are_too_many() -> None:
    segments = split_at_changes(torch.tensor([[1.0, 0.0, 1.0]]), threshold=0.5, least=1)
    strength = torch.tensor([[[-1.0, -1, -1], [0.95, 0.9, 0.97], [-1, -1, -1], [0.95, 0.1, 0.2]]])
    linked = strong_links(strength, segments, threshold=0.8, spare=1)
    # Two tokens of each segment may go; the limit is the second strongest link, and links must exceed it.
    assert linked[0].nonzero().tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("fastvid", "flavour", "film"), ("flashvid", "diversity", "none"), ("flashvid", "alpha", 0.0)],
)
def test_options_of_no_meaning_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .* got {value!r}"):
        get_method(name)(retention_ratio=0.25, **{option: value})
