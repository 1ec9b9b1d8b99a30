"""`prune` on every family: budgets, batches, exactness, what it leaves behind, and what it never computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.vitcop.models import SETUPS, TEXT_FROM, build, make_inputs, take_row
from tests.vitcop.runs import BATCHES, STEPS, cached, hooks, run
from vitcop import ViTCoP, get_method, prune, pruning
from vitcop.mlp import TokenChunks

RATIOS = [1.0, 0.5, 0.11, 0.02]


# -- the matrix: family x attention x ratio x batch


@pytest.mark.parametrize("texts", BATCHES, ids=["batch1", "batch3"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_family(family: str, ratio: float, texts: tuple[int, ...]) -> None:
    model, inputs, setup = build(family), make_inputs(family, texts), SETUPS[family]
    # Tokens that can't be pruned set the least ratio.
    ratio = max(ratio, (setup.frames * setup.fixed[0] + 1) / setup.counted)
    method = ViTCoP(retention_ratio=ratio)
    plain, _ = run(model, inputs)
    before = hooks(model)  # transformers keeps some of its own
    with prune(model, method) as stats:
        logits, lengths = run(model, inputs)
        again, _ = run(model, inputs)
    assert hooks(model) == before
    assert all(torch.equal(first, second) for first, second in zip(logits, again, strict=True))
    _check_budget(stats.last, setup.counted, ratio, lengths, inputs)
    if ratio == 1:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, plain, strict=True))
    for row in range(len(texts) if len(texts) > 1 and ratio < 1 else 0):
        with prune(model, method):
            single, _ = run(model, take_row(inputs, row))
        for step in range(STEPS + 1):
            torch.testing.assert_close(logits[step][row : row + 1], single[step], rtol=0, atol=1e-4)
    model.set_attn_implementation("eager")
    with prune(model, method):
        eager, _ = run(model, inputs)
    if ratio == 1:
        plain, _ = run(model, inputs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(eager, plain, strict=True))
    for ours, theirs in zip(logits, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def _check_budget(record: Any, visual: int, ratio: float, lengths: list[list[int]], inputs: dict[str, Tensor]) -> None:
    """What the record says is what the cache holds, and the mean over layers is what was asked for."""
    assert record.visual_tokens == visual
    assert abs(record.mean_kept - ratio * visual) <= 1
    prompt = inputs["input_ids"].shape[1] - visual
    assert record.prompt_tokens == prompt
    for step, row in enumerate(lengths):
        assert row == [prompt + kept + step for kept in record.kept_per_layer]
    assert list(record.kept_per_layer) == sorted(record.kept_per_layer, reverse=True)
    assert record.kv_bytes == sum(lengths[0]) * 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """Pixels come as float32, as processors make them; features, side features and caches keep the model's type."""
    model, inputs, setup = build(family).to(dtype), make_inputs(family), SETUPS[family]
    if not setup.grid and family != "internvl":  # the others turn pixels into the model's type themselves
        inputs[setup.name] = inputs[setup.name].to(dtype)
    plain = model(**inputs, logits_to_keep=1).logits
    with prune(model, ViTCoP(retention_ratio=1.0)):
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, plain)
    with prune(model, ViTCoP(retention_ratio=0.3)) as stats:
        output = model(**inputs, use_cache=True)
    assert output.logits.dtype == dtype
    assert {layer.keys.dtype for layer in output.past_key_values.layers} == {dtype}
    assert bool(output.logits.isfinite().all())
    assert stats.last.kv_bytes == sum(cached(output.past_key_values)) * 2 * 2 * 8 * 2


def test_shares_of_the_layers(family: str) -> None:
    """Some tokens go before the model, some in the shallow layer, some in the deep one."""
    with prune(model := build(family), ViTCoP(retention_ratio=0.3)) as stats:
        model(**make_inputs(family))
    vision, shallow, deep = stats.last.stages.values()
    assert SETUPS[family].counted > vision > shallow > deep > stats.last.fixed
    assert list(stats.last.stages) == ["vision", "shallow", "deep"]


# -- what stays behind: nothing


def test_models_are_restored_after_an_exception(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    before, attributes, registered = model.generate(**inputs, max_new_tokens=6), set(vars(model)), hooks(model)
    with pytest.raises(KeyboardInterrupt), prune(model, ViTCoP(retention_ratio=0.2)):
        model.generate(**inputs, max_new_tokens=2)
        raise KeyboardInterrupt
    assert hooks(model) == registered
    assert set(vars(model)) == attributes
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), before)


def test_an_error_in_a_forward_does_not_reach_the_next_one(family: str) -> None:
    model, inputs, method = build(family), make_inputs(family), ViTCoP(retention_ratio=0.3)
    with prune(model, method):
        expected, _ = run(model, inputs)
        handle = model.model.language_model.layers[2].register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        logits, _ = run(model, inputs)
        text = model(input_ids=inputs["input_ids"][:, -4:]).logits
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
    assert torch.equal(text, model(input_ids=inputs["input_ids"][:, -4:]).logits)


def _fail(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError


def test_text_alone_is_untouched_inside(family: str) -> None:
    model, ids = build(family), torch.arange(TEXT_FROM, TEXT_FROM + 12)[None]
    before = model.generate(input_ids=ids, max_new_tokens=5)
    with prune(model, ViTCoP(retention_ratio=0.2)) as stats:
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5), before)
    assert stats.last is None


def test_a_model_is_pruned_once_at_a_time() -> None:
    model = build("llava")
    with prune(model, ViTCoP(retention_ratio=0.5)):
        registered = hooks(model)
        with pytest.raises(RuntimeError, match="already being pruned"):
            prune(model, ViTCoP(retention_ratio=0.5)).__enter__()
        assert hooks(model) == registered > 0
    assert hooks(model) == 0
    with prune(model, ViTCoP(retention_ratio=0.5)):
        assert hooks(model) == registered


@pytest.mark.parametrize("fails", ["hook", "mlp"])
def test_entering_that_fails_half_way_leaves_the_model_as_it_was(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
    method, layer = ViTCoP(retention_ratio=0.3), model.model.language_model.layers[3]
    with prune(model, method):
        expected, _ = run(model, inputs)
    attributes, registered = set(vars(model)), hooks(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        if fails == "hook":
            patch.setattr(layer, "register_forward_pre_hook", _fail)
        else:
            patch.setattr(pruning, "TokenChunks", FailsAtTheThird())
        prune(model, method).__enter__()
    assert hooks(model) == registered
    assert set(vars(model)) == attributes
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    with prune(model, method):
        logits, _ = run(model, inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


class FailsAtTheThird:
    """Wraps two MLPs; the third raises."""

    def __init__(self) -> None:
        self.wrapped = 0

    def __call__(self, mlp: nn.Module, tokens: int) -> nn.Module:
        self.wrapped += 1
        return _fail() if self.wrapped == 3 else TokenChunks(mlp, tokens)


def test_no_pruning_is_a_method(family: str) -> None:
    model, inputs, none = build(family), make_inputs(family, (5, 2)), get_method("none")
    plain, lengths = run(model, inputs)
    with prune(model, none(retention_ratio=0.25)) as stats:
        logits, same_lengths = run(model, inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, plain, strict=True))
    assert same_lengths == lengths
    assert none(retention_ratio=0.25) == none()
    assert stats.last.retention == 1
    assert stats.last.method == "KeepAll()"


def test_two_models_by_two_methods() -> None:
    first, second = build("llava_onevision"), build("qwen3_vl")
    ours, theirs = ViTCoP(retention_ratio=0.3), get_method("random")(retention_ratio=0.5)
    inputs, others = make_inputs("llava_onevision"), make_inputs("qwen3_vl")
    with prune(first, ours):
        alone, _ = run(first, inputs)
    with prune(second, theirs):
        alone_too, _ = run(second, others)
    registered = hooks(second)
    with prune(first, ours) as stats:
        with prune(second, theirs) as stats_too:
            output = first(**inputs, logits_to_keep=1)
            both_too, _ = run(second, others)
            both, _ = run(first, inputs)
        assert hooks(second) == registered
    assert all(torch.equal(a, b) for a, b in zip(alone + alone_too, both + both_too, strict=True))
    assert torch.equal(output.logits[:, -1], alone[0])
    assert len(stats.records) == 2
    assert len(stats_too.records) == 1
