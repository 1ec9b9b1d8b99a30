"""What every method that chooses inside the language model must keep to, over the whole registry, on tiny models."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.vitcop.methods.seen import FAMILIES, RATIO, choices, layer_tokens, model_of, prefill, watched
from tests.vitcop.models import SETUPS, TEXT_FROM, VOCABULARY, build, make_inputs, take_row
from vitcop.budget import Geometry, Plan, shares_to_counts
from vitcop.errors import UnreachableBudgetError
from vitcop.methods import DART, METHODS, FastV, Knorm, Method, PyramidDrop, SparseVLM, VScan
from vitcop.methods.inside import OneLayer
from vitcop.methods.sparsevlm import clusters_of, raters, recycle
from vitcop.methods.vscan import most_alike, scan, window_mask
from vitcop.ops.quotas import even_quotas
from vitcop.selection import apply_selection

NAMES = [name for name, method in METHODS.items() if method.select_layer is not Method.select_layer]


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_layers_meets_the_ratio_or_the_ratio_is_refused(name: str) -> None:
    for num_layers in (4, 8, 28, 32, 36):
        geometry, reached = Geometry(num_layers=num_layers, frames=32, height=14, width=14), 0
        for ratio in (0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 1 / 3, 0.5, 0.75, 0.99, 1):
            try:
                counts = METHODS[name](retention_ratio=ratio).plan(geometry).per_layer(num_layers)
            except UnreachableBudgetError as error:
                assert reached == 0 and str(ratio) in str(error)
                continue
            reached += 1
            assert abs(sum(counts) / num_layers - ratio * geometry.num_tokens) <= 1, (num_layers, ratio)
            assert list(counts) == sorted(counts, reverse=True) and counts[-1] >= 1
        assert reached >= 3, num_layers


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].select_frames is Method.select_frames])
def test_a_refusal_names_the_least_ratio_that_is_reached(name: str) -> None:
    geometry = Geometry(num_layers=28, frames=32, height=14, width=14)
    with pytest.raises(UnreachableBudgetError, match=r"layer [\d, ]+ of 28 keeps at least 0\.\d+") as caught:
        METHODS[name](retention_ratio=1e-5).plan(geometry)
    found = re.search(r"at least ([\d.]+)", str(caught.value))
    assert found is not None
    least = float(found[1])
    METHODS[name](retention_ratio=least + 1e-4).plan(geometry)
    with pytest.raises(UnreachableBudgetError):
        METHODS[name](retention_ratio=least - 2e-4).plan(geometry)


@pytest.mark.parametrize(("method", "least"), [(FastV, 2 / 28), (PyramidDrop, 1 / 4), (SparseVLM, 3 / 28)])
def test_layers_before_the_first_stage_see_everything(method: type[Method], least: float) -> None:
    geometry = Geometry(num_layers=28, frames=32, height=14, width=14)
    with pytest.raises(UnreachableBudgetError):
        method(retention_ratio=least - 0.001).plan(geometry)
    method(retention_ratio=least + 0.01).plan(geometry)


def test_pyramiddrops_own_setting_comes_out() -> None:
    """576 tokens, 32 layers, lambda 0.5: (1 + 0.5 + 0.25 + 0.125) / 4 on average."""
    plan = PyramidDrop(retention_ratio=1.875 / 4).plan(Geometry(num_layers=32, frames=1, height=24, width=24))
    assert dict(plan.layers) == {8: 288, 16: 144, 24: 72}
    assert shares_to_counts(75, [0.5, 0.25, 0.001]) == [37, 18, 1]


def test_sparsevlms_own_setting_comes_out() -> None:
    """576 tokens, 32 layers: counts in the authors' proportion where the ratio is that of their counts."""
    kept = (3 * 576 + 4 * 300 + 9 * 200 + 16 * 110) / 32 / 576
    plan = SparseVLM(retention_ratio=kept).plan(Geometry(num_layers=32, frames=1, height=24, width=24))
    assert dict(plan.layers) == {3: 300, 7: 200, 16: 110}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_pruned_as_they_are_alone(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is more padding than visual tokens, so that it is among the last rows of the sequence."""
    model, inputs, method = model_of(family), make_inputs(family, (4, 90, 6)), METHODS[name](retention_ratio=RATIO)
    if SETUPS[family].grid is None:  # positions that don't count padding, as `generate` passes them
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits, _, _ = prefill(model, inputs, method)
    together = choices(model, inputs, method, monkeypatch)
    for row in range(3):
        single = take_row(inputs, row)
        torch.testing.assert_close(prefill(model, single, method)[0][0], logits[row], atol=1e-4, rtol=1e-4)
        for both, alone in zip(together, choices(model, single, method, monkeypatch), strict=True):
            assert torch.equal(both[row], alone[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_prompt_is_pruned_the_same_way_twice(name: str) -> None:
    model, inputs, method = (
        model_of("qwen2_5_vl"),
        make_inputs("qwen2_5_vl", (5, 8)),
        METHODS[name](retention_ratio=RATIO),
    )
    assert torch.equal(prefill(model, inputs, method)[0], prefill(model, inputs, method)[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_question_steers_methods_that_say_so_and_no_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("qwen3_vl"), make_inputs("qwen3_vl", (12,))
    method, generator, changed = METHODS[name](retention_ratio=RATIO), torch.Generator().manual_seed(3), False
    first = choices(model, inputs, method, monkeypatch)
    for _ in range(5):
        ids = inputs["input_ids"].clone()
        ids[:, -12:] = torch.randint(TEXT_FROM, VOCABULARY, (1, 12), generator=generator)
        other = choices(model, inputs | {"input_ids": ids}, method, monkeypatch)
        changed |= not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert changed == method.query_aware


@pytest.mark.parametrize("name", NAMES)
def test_no_choice_waits_for_values_of_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have shapes and no values: reading one back to the host raises."""
    method = METHODS[name](retention_ratio=RATIO)
    with watched(method, monkeypatch) as seen:
        prefill(model_of("qwen2_5_vl"), make_inputs("qwen2_5_vl", (4, 9)), method)
    for tokens, plan, geometry, selection in seen:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            values = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
            tensors = {key: fake.from_tensor(value) for key, value in values.items() if isinstance(value, Tensor)}
            rotary = (fake.from_tensor(tokens.rotary[0]), fake.from_tensor(tokens.rotary[1]))
            chosen = method.select_layer(replace(tokens, **tensors, rotary=rotary), plan, geometry)
        assert isinstance(chosen.keep, FakeTensor) and chosen.keep.shape == selection.keep.shape


@pytest.mark.parametrize("name", NAMES)
def test_methods_run_in_bfloat16(name: str) -> None:
    model, inputs = build("qwen2_5_vl").bfloat16(), make_inputs("qwen2_5_vl", (4, 9))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    logits, cached, planned = prefill(model, inputs, METHODS[name](retention_ratio=RATIO))
    assert cached == planned and logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    model, inputs = model_of("llava_onevision"), make_inputs("llava_onevision")
    with torch.no_grad():
        full = model(**inputs, logits_to_keep=1).logits[:, -1]
    assert torch.equal(prefill(model, inputs, METHODS[name](retention_ratio=1))[0], full)


@pytest.mark.parametrize("count", [2, 4, 9, 21, 36])
def test_dart_keeps_visual_pivots_and_gives_the_others_even_shares(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = layer_tokens("qwen2_5_vl", "dart", monkeypatch)
    method = DART(retention_ratio=RATIO)
    visual, text = method.pivots(tokens)
    keep = method.select_layer(tokens, Plan(entering=80, layers={tokens.layer: count}), None).keep  # type: ignore[arg-type]
    points = torch.nn.functional.normalize(tokens.language.final_norm(tokens.hidden), dim=-1).detach()
    for row in range(2):
        assert tokens.question[row, text[row]].all()
        kept = visual[row, :count].tolist()
        pivots = [*tokens.visual[row, kept].tolist(), *text[row].tolist()]
        left = [index for index in range(80) if index not in kept]
        spare = count - len(kept)
        for turn, pivot in enumerate(pivots):
            share = spare // len(pivots) + (turn < spare % len(pivots))
            likeness = points[row, tokens.visual[row]] @ points[row, pivot]
            left.sort(key=lambda index: float(likeness[index]))
            kept, left = kept + left[:share], left[share:]
        assert keep[row].tolist() == sorted(kept)


def test_a_question_shorter_than_its_pivots_repeats_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = layer_tokens("llava_onevision", "dart", monkeypatch, (2, 6))
    _, text = DART(retention_ratio=RATIO).pivots(tokens)
    assert len(set(text[0].tolist())) == 2 and len(set(text[1].tolist())) == 4
    assert (text[0, 2:] == text[0, 0]).all()


def test_key_norms_from_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = layer_tokens("llava_onevision", "knorm", monkeypatch)
    plan, norm = Plan(entering=64, layers={tokens.layer: 20}), tokens.keys.norm(dim=-1).mean(dim=1)
    for keep, bound in (("small", norm.sort(dim=1).values[:, 19]), ("large", -norm.sort(dim=1).values[:, -20])):
        kept = Knorm(retention_ratio=RATIO, keep=keep).select_layer(tokens, plan, None).keep  # type: ignore[arg-type]
        sign = 1 if keep == "small" else -1
        assert (sign * norm.gather(1, kept) <= bound[:, None]).all()


def test_every_count_that_a_stage_may_leave_is_kept_and_merged_tokens_together() -> None:
    method = SparseVLM(retention_ratio=0.5)
    for entering in (2, 3, 9, 10, 11, 60, 64, 65, 131, 250):
        for left in range(method.least(entering), entering):
            assert any(kept + clusters_of(entering - kept) == left for kept in range(1, left))


@pytest.mark.parametrize("kept", [1, 20, 58])
def test_recycled_tokens_become_the_means_of_their_clusters(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features, score = torch.randn(2, 60, 6, generator=generator), torch.rand(2, 60, generator=generator)
    result = recycle(features, score, kept)
    selection = result.selection(60)
    merged = apply_selection(selection, features)
    assert selection.keep.shape[1] == kept + clusters_of(60 - kept)
    for row in range(2):
        order = score[row].argsort(descending=True)
        assert result.kept[row].tolist() == sorted(order[:kept].tolist())
        assert result.candidates[row].tolist() == order[kept : kept + int(0.3 * (60 - kept)) + 1].tolist()
        for number, centre in enumerate(result.candidates[row, result.centres[row]].tolist()):
            group = result.candidates[row, result.cluster[row] == number]
            place = selection.keep[row].tolist().index(centre)
            assert centre in group
            torch.testing.assert_close(merged[row, place], features[row, group].mean(dim=0))
        for index in result.kept[row].tolist():
            assert torch.equal(merged[row, selection.keep[row].tolist().index(index)], features[row, index])


def test_a_question_of_equal_tokens_has_them_all_as_raters(monkeypatch: pytest.MonkeyPatch) -> None:
    method, inputs = SparseVLM(retention_ratio=RATIO), make_inputs("qwen2_5_vl", (1, 6))
    with watched(method, monkeypatch) as seen:
        prefill(model_of("qwen2_5_vl"), inputs, method)
    rater = raters(seen[0][0]).sum(dim=1)
    assert rater[0] == 1 and 1 <= rater[1] < 6


def test_the_local_scan_takes_the_best_of_each_window_in_turn() -> None:
    attention = torch.tensor([9.0, 8, 7, 0, 6, 5, 1, 2, 3, 4, 0.5, 0.25])[None, None]  # 3 rows of 4
    same = window_mask(3, 4, 2, attention.device)
    assert same[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert same[8].nonzero().flatten().tolist() == [8, 9]
    # Global: 0, 1. Then the best left of each window: 2 (right), 4 (left), 9 (bottom left), 10 (bottom right).
    for quota, kept in ((2, [0, 1]), (3, [0, 1, 2]), (6, [0, 1, 2, 4, 5, 9])):
        chosen = scan(attention, same, torch.tensor([quota]))
        assert int(chosen.sum()) == quota
        assert quota != 3 or chosen[0, 0].nonzero().flatten().tolist() == kept


def test_tokens_that_are_not_chosen_join_the_most_alike_of_their_frame() -> None:
    features = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(2, 3, 8, dtype=torch.bool)
    chosen[:, 0, [1, 4]] = chosen[:, 2, [0, 7]] = True
    slot = most_alike(features, chosen).view(2, 3, 8)
    unit = torch.nn.functional.normalize(features, dim=-1)
    assert (slot[:, 1] == -1).all()
    assert (slot[:, 0, 1] == 0).all() and (slot[:, 0, 4] == 1).all() and (slot[:, 2, 7] == 3).all()
    for row in range(2):
        for token in range(8):
            likeness = [float(unit[row, 2, token] @ unit[row, 2, other]) for other in (0, 7)]
            assert int(slot[row, 2, token]) == 2 + (likeness[1] > likeness[0])


def test_vscan_leaves_a_third_in_mid_model() -> None:
    plan = VScan(retention_ratio=1 / 9).plan(Geometry(num_layers=32, frames=1, height=24, width=24))
    assert plan.entering == pytest.approx(96, abs=1) and plan.layers[16] == pytest.approx(32, abs=1)
    assert int(even_quotas(plan.entering, 1, torch.device("cpu")).sum()) == plan.entering


def test_one_layer_methods_take_another_layer() -> None:
    geometry = Geometry(num_layers=8, frames=4, height=4, width=4)
    for name in NAMES:
        if issubclass(METHODS[name], OneLayer):
            plan = METHODS[name](retention_ratio=0.6, layer=3).plan(geometry)
            assert list(plan.layers) == [3] and plan.per_layer(8)[:3] == (64, 64, 64)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("dart", "pivot_image_tokens", 0),
        ("dart", "pivot_text_tokens", 0),
        ("expected_attention", "future_positions", 0),
        ("vscan", "window", 0),
        ("vscan", "inner_share", 1.5),
        ("flashvid", "alpha", 0.0),
        ("vitcop", "vision_keep", 0.0),
        ("vitcop", "vision_keep", 1.5),
        ("vitcop", "cluster_fraction", 2.0),
        ("knorm", "keep", "middle"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{setting} must .*{value}"):
        METHODS[name](retention_ratio=0.5, **{setting: value})
