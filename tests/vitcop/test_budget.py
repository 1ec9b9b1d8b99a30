"""Budgets: a ratio is met by what the cache holds, tokens that can't be pruned included, or the least one is named."""

from __future__ import annotations

import re

import pytest

from tests.vitcop.models import ALL_SETUPS, LAYERS, build, make_inputs
from vitcop import (
    METHODS,
    Method,
    UnreachableBudgetError,
    family_of,
    get_method,
    prune,
)
from vitcop.budget import Geometry, scaled_layers, solve_stages


def test_ratios_below_one_token_are_named() -> None:
    model, inputs = build("llava"), make_inputs("llava")
    random = get_method("random")(retention_ratio=0.002)
    with prune(model, random), pytest.raises(UnreachableBudgetError, match="use at least"):
        model(**inputs)


def test_layers_follow_the_depth_and_never_meet() -> None:
    assert scaled_layers([2], 28) == scaled_layers([2], 32) == scaled_layers([2], 36) == (2,)
    assert scaled_layers([8, 16, 24], 28) == (7, 14, 21)
    assert scaled_layers([3, 7, 16], 8) == (1, 2, 4)
    assert scaled_layers([3, 7, 16], 4) == (1, 2, 3)


@pytest.mark.parametrize("layers", [(), (0,), (4, 4), (5, 2), (8,)])
def test_layers_that_do_not_ascend_within_the_model_are_refused(layers: tuple[int, ...]) -> None:
    geometry = Geometry(num_layers=8, frames=2, height=3, width=3)
    with pytest.raises(ValueError, match="between 1 and 7"):
        solve_stages(geometry, 0.5, layers, lambda scale: [9] * len(layers))


RATIOS = (0.11, 0.4, 0.9)
WITH_RATIO = [name for name, method in METHODS.items() if not method.fixed_budget]


def least_of(error: BaseException) -> float:
    """The least ratio that a refusal names."""
    found = re.search(r"at least (\d\.\d+)", str(error))
    assert found is not None, str(error)
    return float(found[1])


def within_reach(name: str, ratio: float, geometry: Geometry) -> float:
    """The ratio, or the least one that its refusal names."""
    try:
        METHODS[name](retention_ratio=ratio).plan(geometry)
    except UnreachableBudgetError as error:
        assert least_of(error) > ratio
        return least_of(error)
    return ratio


@pytest.mark.parametrize("family", ALL_SETUPS)
def test_every_layers_cache_holds_what_the_record_says_and_the_ratio_asks_for(family: str) -> None:
    model, inputs, setup = build(family), make_inputs(family, (6, 3)), ALL_SETUPS[family]
    geometry, text = family_of(model).geometry(inputs), inputs["input_ids"].shape[1] - setup.counted
    for name in METHODS:
        for wanted in RATIOS:
            if name == "downscale" and family != "llava_onevision":
                continue
            ratio = within_reach(name, wanted, geometry)
            with prune(model, METHODS[name](retention_ratio=ratio), frame_chunk=2) as stats:
                output = model(**inputs, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            assert output.logits.isfinite().all(), (name, ratio)
            record, held = stats.last, [layer.keys.shape[2] for layer in cache.layers]
            assert held == [text + kept for kept in record.kept_per_layer], (name, ratio)
            assert record.kv_bytes == sum(held) * 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 float32
            assert (record.visual_tokens, record.prompt_tokens) == (setup.counted, text)
            assert record.fixed == setup.frames * setup.fixed[0] <= min(record.kept_per_layer)
            assert list(record.stages.values()) == sorted(record.stages.values(), reverse=True)
            assert record.retention < 1 or name == "none" or setup.frames == 1
            if METHODS[name].select_layer is not Method.select_layer and ratio == 0.4:
                assert len(set(held)) > 1, name  # layers differ
            if name in WITH_RATIO:
                assert abs(sum(held) / LAYERS - text - ratio * setup.counted) <= 1, (name, ratio)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_what_is_fixed_is_part_of_the_ratio_and_less_is_refused_with_the_least_that_is_reached(name: str) -> None:
    for frames, side in ((8, 16), (32, 14), (3, 7)):
        geometry = Geometry(num_layers=28, frames=frames, height=side, width=side, fixed=frames)
        visual = geometry.num_tokens + geometry.fixed
        fixed = geometry.fixed / visual
        for ratio in (0.0001, fixed / 2, fixed * 0.99):
            with pytest.raises(UnreachableBudgetError, match=rf"{frames} tokens that can't be pruned") as caught:
                METHODS[name](retention_ratio=ratio).plan(geometry)
            least = least_of(caught.value)
            assert least >= fixed
            _check_mean(name, least, geometry)
        for ratio in (0.02, 0.06, 0.13, 0.3, 0.5, 0.75, 0.99, 1.0):
            _check_mean(name, within_reach(name, ratio, geometry), geometry)


def _check_mean(name: str, ratio: float, geometry: Geometry) -> None:
    counts = METHODS[name](retention_ratio=ratio).plan(geometry).per_layer(geometry.num_layers)
    visual = geometry.num_tokens + geometry.fixed
    assert abs(sum(counts) / geometry.num_layers + geometry.fixed - ratio * visual) <= 1
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] >= 1


def test_without_fixed_tokens_a_ratio_is_one_of_the_grids() -> None:
    geometry = Geometry(num_layers=7, frames=3, height=5, width=5)
    for percent in range(1, 101):
        assert geometry.share(percent / 100) == percent / 100


def test_six_percent_of_video_llava() -> None:
    """8 frames of 16x16 tokens and their CLS tokens: 6 % of all, of which more than a twentieth are CLS tokens."""
    geometry = Geometry(num_layers=32, frames=8, height=16, width=16, fixed=8)
    plan = METHODS["random"](retention_ratio=0.06).plan(geometry)
    assert plan.entering + 8 == round(0.06 * 8 * 257)
