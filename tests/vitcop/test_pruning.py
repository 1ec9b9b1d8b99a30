"""`prune` on every family: budgets, batches, exactness, what it leaves behind, and what it never computes."""

from __future__ import annotations

import copy
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.vitcop.models import LAYERS, SETUPS, TEXT_FROM, VOCABULARY, build, make_inputs, take_row
from vitcop import UnreachableBudgetError, UnsupportedInputError, ViTCoP, get_method, prune, pruning, record_of
from vitcop.budget import Geometry, Plan
from vitcop.methods.base import Method
from vitcop.mlp import TokenChunks
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens, VisualTokens

RATIOS = [1.0, 0.5, 0.11, 0.02]
BATCHES = [(5,), (6, 3, 1)]
STEPS = 3


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def cached(cache: DynamicCache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


def run(model: PreTrainedModel, inputs: dict[str, Tensor], steps: int = STEPS) -> tuple[list[Tensor], list[list[int]]]:
    """Last-token logits (B, vocabulary) of a prefill and of `steps` fixed tokens after it, and the cache lengths."""
    mask = inputs["attention_mask"]
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    output = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    logits, lengths = [output.logits[:, -1]], [cached(output.past_key_values)]
    for step in range(steps):
        mask, positions = functional.pad(mask, (0, 1), value=1), positions[..., -1:] + 1
        output = model(
            input_ids=torch.full((len(mask), 1), TEXT_FROM + step),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=output.past_key_values,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
        lengths.append(cached(output.past_key_values))
    return logits, lengths


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


# -- exactness: pruning equals leaving tokens out by hand


@dataclass(frozen=True, kw_only=True)
class KeepAt(Method):
    """Keeps chosen tokens, from chosen layers on."""

    name: ClassVar[str] = "keep_at"

    stages: tuple[tuple[int, tuple[int, ...]], ...]

    def plan(self, geometry: Geometry) -> Plan:
        counts = {layer: len(tokens) for layer, tokens in self.stages}
        return Plan(entering=counts.pop(-1, geometry.num_tokens), layers=counts)

    def _select(self, index: Tensor, layer: int) -> Selection:
        wanted = torch.tensor(dict(self.stages).get(layer, range(index.shape[1])))
        return Selection(keep=top_k_in_order(torch.isin(index, wanted).float(), len(wanted)))

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        return self._select(torch.arange(geometry.num_tokens).expand(len(tokens.features), -1), -1)

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        return self._select(tokens.index, tokens.layer)


@contextmanager
def masked(model: PreTrainedModel, inputs: dict[str, Tensor], stages: dict[int, tuple[int, ...]]) -> Iterator[None]:
    """The unpruned model, in which no token sees a left-out one from a stage's layer on."""
    setup, ids = SETUPS[next(name for name in SETUPS if name == model.config.model_type)], inputs["input_ids"]
    handles = []
    for layer, module in enumerate(model.model.language_model.layers):
        kept = next((tokens for first, tokens in sorted(stages.items(), reverse=True) if layer >= first), None)
        if kept is None:
            continue
        mask = inputs["attention_mask"].bool().clone()
        for row, tokens in enumerate(ids):
            places = (tokens == setup.token).nonzero().flatten()
            offset = setup.fixed[0]
            visual = places[: setup.frames * (setup.per_frame + offset)].view(setup.frames, -1)[:, offset:].flatten()
            left_out = torch.ones(len(visual), dtype=torch.bool)
            left_out[list(kept)] = False
            mask[row, visual[left_out]] = False

        def replace(module: nn.Module, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            hidden = args[0]
            attention = create_causal_mask(model.config.get_text_config(), hidden, mask, None)
            return args, kwargs | {"attention_mask": attention}

        handles.append(module.register_forward_pre_hook(replace, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("texts", [(5,), (5, 2)], ids=["batch1", "batch2"])
@pytest.mark.parametrize("layers", [(-1,), (2,), (-1, 1, 3)], ids=["before", "inside", "all"])
def test_pruning_is_leaving_tokens_out(family: str, layers: tuple[int, ...], texts: tuple[int, ...]) -> None:
    """Positions, masks and side features of the others are untouched: masking the pruned ones gives the same."""
    model, inputs = build(family, "eager"), make_inputs(family, texts)
    generator = torch.Generator().manual_seed(3)
    tokens, stages = torch.arange(SETUPS[family].visual_tokens), {}
    for layer in layers:
        tokens = tokens[torch.randperm(len(tokens), generator=generator)[: len(tokens) // 2]].sort().values
        stages[layer] = tuple(tokens.tolist())
    with prune(model, KeepAt(retention_ratio=0.5, stages=tuple(stages.items()))):
        pruned = model(**inputs, logits_to_keep=1).logits
    with masked(model, inputs, stages):
        reference = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(pruned, reference, rtol=0, atol=2e-5)


def test_pruning_before_layer_1_sees_what_layer_0_saw(family: str) -> None:
    """The same tokens left out before the model or before its layer 1: layer 0's keys of those kept are equal."""
    model, inputs = build(family), make_inputs(family)
    kept = tuple(range(0, SETUPS[family].visual_tokens, 3))
    caches = []
    for layer in (-1, 1):
        with prune(model, KeepAt(retention_ratio=0.5, stages=((layer, kept),))):
            caches.append(model(**inputs, use_cache=True).past_key_values)
    before, inside = (cache.layers[0].keys for cache in caches)
    assert cached(caches[0])[1:] == cached(caches[1])[1:]
    for key in before.unbind(2):
        assert (inside - key[:, :, None]).abs().amax(dim=(0, 1, 3)).min() < 1e-5


@pytest.mark.parametrize("frame_chunk", [1, 3])
def test_chunks_of_frames_change_nothing(family: str, frame_chunk: int) -> None:
    model, inputs, method = build(family), make_inputs(family, (4, 2)), ViTCoP(retention_ratio=0.3)
    with prune(model, method):
        whole, _ = run(model, inputs)
    with prune(model, method, frame_chunk=frame_chunk):
        chunked, _ = run(model, inputs)
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_key_source(family: str) -> None:
    """Rotation turns all heads' keys alike, so only a norm on the keys (Qwen3) can make the two differ."""
    model, inputs = build(family), make_inputs(family)
    kept = []
    for source in ("cached", "before_norm"):
        with prune(model, ViTCoP(retention_ratio=0.3, key_source=source)) as stats:
            model(**inputs)
        kept.append([index.tolist() for index in stats.last.kept_index.values()])
    assert (kept[0] == kept[1]) == (family != "qwen3_vl")


def test_plain_keys_are_what_k_proj_puts_out(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    seen, outputs = {}, {}

    @dataclass(frozen=True, kw_only=True)
    class Reads(ViTCoP):
        def saliency(self, tokens: LayerTokens, geometry: Geometry) -> Tensor:
            seen[tokens.layer] = tokens.plain_keys, tokens.visual
            return super().saliency(tokens, geometry)

    layers = model.model.language_model.layers

    def keep(number: int, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.setdefault(number, output)  # the first one is the layer's own

    handles = [
        layer.self_attn.k_proj.register_forward_hook(functools.partial(keep, number))
        for number, layer in enumerate(layers)
    ]
    with prune(model, Reads(retention_ratio=0.3, key_source="before_norm")):
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert sorted(seen) == [1, 3]
    for layer, (keys, visual) in seen.items():
        expected = outputs[layer - 1][0, visual[0]].unflatten(-1, (2, 8)).transpose(0, 1)
        torch.testing.assert_close(keys[0], expected)


@pytest.mark.parametrize(("setting", "value"), [("key_source", "rotated"), ("key_score", "medium")])
def test_unknown_settings_are_named(setting: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        ViTCoP(retention_ratio=0.5, **{setting: value})


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


def test_two_clips_in_flight_have_a_record_each_and_go_on_from_their_own_caches(family: str) -> None:
    model, method = build(family), ViTCoP(retention_ratio=0.3)
    clips = [make_inputs(family, (5,), seed=1), make_inputs(family, (4, 2), seed=2)]
    with prune(model, method):
        alone = [run(model, inputs, steps=1) for inputs in clips]
    with prune(model, method) as stats:
        caches = [model(**inputs, use_cache=True).past_key_values for inputs in clips]
        copies = copy.deepcopy(caches)
        for cache, inputs, (logits, lengths) in zip(copies, clips, alone, strict=True):
            mask = functional.pad(inputs["attention_mask"], (0, 1), value=1)
            ids = torch.full((len(mask), 1), TEXT_FROM)
            step = model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
            torch.testing.assert_close(step.logits[:, -1], logits[1], rtol=0, atol=1e-5)
            assert cached(cache) == lengths[1]
    for record, cache, copied, inputs in zip(stats.records, caches, copies, clips, strict=True):
        assert record_of(cache) is record is record_of(copied)
        assert record.batch == len(inputs["input_ids"])
        assert [record.prompt_tokens + kept for kept in record.kept_per_layer] == cached(cache)


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


def test_caches_of_unpruned_prefills_have_a_record_and_those_of_text_have_none(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, ViTCoP(retention_ratio=1.0)) as stats:
        cache = model(**inputs, use_cache=True).past_key_values
        text = model(input_ids=torch.tensor([[20, 21]]), use_cache=True).past_key_values
    assert record_of(cache) is stats.last
    assert record_of(text) is None
    assert record_of(model(**inputs, use_cache=True).past_key_values) is None


def test_stages_are_those_of_the_plan_also_where_one_leaves_as_many_tokens(family: str) -> None:
    """Layers 2 and 4 are stages; the first of them drops nothing."""
    model, inputs = build(family), make_inputs(family, (5, 3))
    everything, kept = tuple(range(SETUPS[family].visual_tokens)), (0, 3, 5)
    with prune(model, KeepAt(retention_ratio=0.5, stages=((2, everything), (4, kept)))) as stats:
        logits, lengths = run(model, inputs)
    with prune(model, KeepAt(retention_ratio=0.5, stages=((4, kept),))):
        expected, same_lengths = run(model, inputs)
    fixed = stats.last.fixed
    assert stats.last.kept_per_layer == (len(everything) + fixed,) * 4 + (3 + fixed,)
    assert lengths == same_lengths
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


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


# -- inputs that can't be pruned


def test_embeddings_are_refused() -> None:
    model, inputs = build("llava"), make_inputs("llava")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with prune(model, ViTCoP(retention_ratio=0.5)), pytest.raises(UnsupportedInputError, match="inputs_embeds"):
        model(**inputs, inputs_embeds=embeds)


def test_encoded_features_are_refused() -> None:
    model, inputs = build("qwen2_vl"), make_inputs("qwen2_vl")
    pixels, grid = inputs.pop("pixel_values_videos"), inputs["video_grid_thw"]
    encoded = {"video": model.model.get_video_features(pixels, grid, return_dict=True)}
    with prune(model, ViTCoP(retention_ratio=0.5)), pytest.raises(UnsupportedInputError, match="pass the pixels"):
        model(**inputs, mm_encoder_outputs=encoded)


def test_masks_of_four_dimensions_are_refused(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None]
    with prune(model, ViTCoP(retention_ratio=0.5)), pytest.raises(UnsupportedInputError, match="attention_mask"):
        model(**inputs)


def test_videos_after_a_cached_text_are_refused(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, ViTCoP(retention_ratio=0.5)):
        cache = model(input_ids=torch.tensor([[20, 21]]), use_cache=True).past_key_values
        del inputs["attention_mask"]
        with pytest.raises(UnsupportedInputError, match="start from the video"):
            model(**inputs, past_key_values=cache)


def test_more_prompts_than_videos_must_divide() -> None:
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision", (4, 4, 4))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:2]
    with prune(model, ViTCoP(retention_ratio=0.5)), pytest.raises(UnsupportedInputError, match="2 videos for 3"):
        model(**inputs)


def test_ratios_below_one_token_are_named() -> None:
    model, inputs = build("llava"), make_inputs("llava")
    random = get_method("random")(retention_ratio=0.002)
    with prune(model, random), pytest.raises(UnreachableBudgetError, match="use at least"):
        model(**inputs)


# -- no attention maps in the language model


class NoMaps(TorchDispatchMode):
    """Fails when a tensor of `size` x `size` or more, or a softmax over that many rows, is made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and min(tensor.shape[-2:]) >= self.size:
                raise AssertionError(f"{func} made a tensor of shape {tuple(tensor.shape)}")
        return result


def long_inputs(family: str) -> dict[str, Tensor]:
    """A prompt whose text alone is longer than any other dimension in the model."""
    inputs = make_inputs(family, (VOCABULARY + 10,))
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


@pytest.mark.parametrize("method", [ViTCoP(retention_ratio=0.3), ViTCoP(retention_ratio=0.3, key_source="before_norm")])
def test_no_attention_map_is_made(family: str, method: Method) -> None:
    model, inputs = build(family), long_inputs(family)
    with prune(model, method) as stats, NoMaps(VOCABULARY + 1):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        model(input_ids=torch.tensor([[20, 21]]), past_key_values=cache)
    assert min(cached(cache)) > VOCABULARY + 1
    assert stats.last.retention < 0.4


def test_the_check_for_maps_can_fail() -> None:
    model, inputs = build("llava", "eager"), long_inputs("llava")
    with pytest.raises(AssertionError, match="made a tensor"), NoMaps(VOCABULARY + 1):
        model(**inputs, logits_to_keep=1)


# -- flash attention: what it is given, without a GPU


@contextmanager
def fake_flash(model: PreTrainedModel) -> Iterator[list[int]]:
    """The language model under the name `flash_attention_2`, by a function that checks masks as the kernel needs them.

    Flash attention takes no map of a mask: None, or (B, keys) of the very keys it gets, and looks for packed prompts
    in position ids with gaps. Yields the number of keys of each call.
    """
    keys: list[int] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        keys.append(key.shape[2])
        positions = kwargs.get("position_ids")
        if positions is not None and len(positions) == 1:
            assert bool((positions.diff(dim=-1) == 1).all()), "would be taken for packed prompts"
        full = None
        if mask is not None:
            assert mask.shape == (len(key), key.shape[2])
            assert mask.dtype == torch.bool
            assert not mask.all()
            rows = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
            full = mask[:, None, None] & (torch.arange(key.shape[2]) <= rows)
            full = full | ~full.any(dim=-1, keepdim=True)  # rows of padding see anything; nobody reads them
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        causal = full is None and query.shape[2] > 1
        if causal:
            assert query.shape[2] == key.shape[2]
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=full, is_causal=causal, scale=kwargs["scaling"]
        )
        return output.transpose(1, 2).contiguous(), None

    configs = {
        id(module.config): module.config for module in model.model.language_model.modules() if hasattr(module, "config")
    }
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = attend
    for config in configs.values():
        config._attn_implementation = "flash_attention_2"
    yield keys
    for config in configs.values():
        config._attn_implementation = "sdpa"
    del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]  # the one of transformers shows again


@pytest.mark.parametrize("texts", BATCHES, ids=["batch1", "batch3"])
def test_flash_attention_gets_masks_of_the_keys_that_are_there(family: str, texts: tuple[int, ...]) -> None:
    model, inputs, method = build(family), make_inputs(family, texts), ViTCoP(retention_ratio=0.3)
    with prune(model, method):
        expected, lengths = run(model, inputs)
    with fake_flash(model) as keys, prune(model, method):
        logits, _ = run(model, inputs)
    assert keys == [length for step in lengths for length in step]
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_flex_attention_gets_masks_of_each_stage(family: str) -> None:
    """Masks are made by transformers, of the kind that the implementation takes, for the keys of each stage."""
    model, inputs = build(family), make_inputs(family, (5, 2))
    lengths: list[tuple[int, int]] = []

    def mask_of(batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor, **_: Any) -> int:
        assert attention_mask.shape == (batch_size, kv_length)
        return kv_length

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: int, **_: Any) -> Any:
        lengths.append((mask, key.shape[2]))
        return query.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["flex_attention"] = attend
    ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"] = mask_of
    model.model.language_model.config._attn_implementation = "flex_attention"
    with prune(model, ViTCoP(retention_ratio=0.3)):
        model(**inputs)
    del ALL_ATTENTION_FUNCTIONS["flex_attention"], ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"]
    assert len(lengths) == LAYERS
    assert len({keys for _, keys in lengths}) == 3
    assert all(mask == keys for mask, keys in lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("texts", BATCHES, ids=["batch1", "batch3"])
def test_flash_attention_on_a_gpu(family: str, texts: tuple[int, ...]) -> None:
    model = build(family).to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in make_inputs(family, texts).items()}
    method, logits = ViTCoP(retention_ratio=0.3), {}
    for attention in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(attention)
        with prune(model, method):
            logits[attention] = model(**inputs, logits_to_keep=1).logits.float()
    difference = (logits["sdpa"] - logits["flash_attention_2"]).abs().max()
    assert difference < 0.1 * logits["sdpa"].abs().max()


# -- no host synchronisation


@dataclass(frozen=True, kw_only=True)
class OnMeta(ViTCoP):
    """Gets its tokens on the meta device, where a value that is read back raises."""

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        assert tokens.features.is_meta
        return super().select_frames(tokens, plan, geometry)


def test_selection_reads_nothing_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values, `.item()`, `.tolist()`, `bool()`, `nonzero` and copies to the CPU all raise.

    The geometry of the clip is asked for before: it comes from the placeholders (pictures) or the grid (Qwen).
    """
    model, inputs = build(family), make_inputs(family)
    context = prune(model, OnMeta(retention_ratio=0.3), frame_chunk=2)
    adapter = context.family
    geometry = adapter.geometry(inputs)
    chunks = [_to_meta(chunk) for chunk in adapter.encode(inputs, geometry, context.method.needs, 2)]
    monkeypatch.setattr(adapter, "geometry", lambda inputs: geometry)
    monkeypatch.setattr(adapter, "encode", lambda *args: iter(chunks))
    ids = inputs["input_ids"].to("meta")
    positions = torch.empty((3, *ids.shape) if SETUPS[family].grid else ids.shape, dtype=torch.long, device="meta")
    model.to("meta")
    with context as stats:
        model(input_ids=ids, pixel_values=ids, position_ids=positions) if SETUPS[
            family
        ].name == "pixel_values" else model(input_ids=ids, pixel_values_videos=ids, position_ids=positions)
    assert len(stats.last.stages) == 3


def _to_meta(tokens: VisualTokens) -> VisualTokens:
    fields = {name: getattr(tokens, name) for name in VisualTokens.__dataclass_fields__}
    moved = {name: value.to("meta") for name, value in fields.items() if isinstance(value, Tensor)}
    deepstack = tuple(side.to("meta") for side in tokens.deepstack)
    return VisualTokens(**{**fields, **moved, "deepstack": deepstack})


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "video_llava"])
def test_vision_of_video_towers_reads_nothing_back(family: str) -> None:
    model = build(family).to("meta")
    inputs = {name: value.to("meta") for name, value in make_inputs(family).items() if name != "attention_mask"}
    with prune(model, ViTCoP(retention_ratio=0.3), frame_chunk=2) as stats:
        model(**inputs)
    assert len(stats.last.stages) == 3


class CountReads(TorchDispatchMode):
    """Counts the operations by which a value reaches the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select")
        self.count += str(func).startswith(names)
        return func(*args, **(kwargs or {}))


def test_selection_inside_the_model_reads_no_value(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    counts: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Counted(ViTCoP):
        def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
            with CountReads() as reads:
                selection = super().select_frames(tokens, plan, geometry)
            counts.append(reads.count)
            return selection

        def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
            with CountReads() as reads:
                selection = super().select_layer(tokens, plan, geometry)
            counts.append(reads.count)
            return selection

    with prune(model, Counted(retention_ratio=0.3)):
        model(**inputs)
    assert counts == [0, 0, 0]
    with CountReads() as reads:
        torch.tensor([0, 1]).nonzero()
        bool(torch.tensor(True))
    assert reads.count == 2


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "video_llava"])
def test_one_value_is_read_before_the_vision_tower_runs(family: str) -> None:
    """Whether every row has its placeholders; the other families also read the clip's grid."""
    model, inputs = build(family), make_inputs(family, (5, 2))
    before_tower: list[int] = []
    with prune(model, ViTCoP(retention_ratio=0.3)) as stats, CountReads() as reads:
        tower = model.model.video_tower if family == "video_llava" else model.model.vision_tower
        handle = tower.register_forward_pre_hook(lambda module, args: before_tower.append(reads.count))
        model(**inputs)
    handle.remove()
    assert stats.last.retention < 0.4
    assert before_tower == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_prefill_synchronises_once_on_a_gpu() -> None:
    model = build("llava_onevision").to("cuda")
    inputs = {name: value.cuda() for name, value in make_inputs("llava_onevision").items() if name != "attention_mask"}
    with prune(model, ViTCoP(retention_ratio=0.3)) as stats:
        model(**inputs)
        pixels = inputs["pixel_values_videos"].clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(**inputs | {"pixel_values_videos": pixels})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(stats.records) == 2
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_wrong_batch_leaves_the_gpu_usable() -> None:
    model = build("llava_onevision").to("cuda")
    inputs = {name: value.cuda() for name, value in make_inputs("llava_onevision", (5, 5)).items()}
    wrong = inputs | {"input_ids": inputs["input_ids"].clone()}
    wrong["input_ids"][1, 3] = TEXT_FROM
    with prune(model, ViTCoP(retention_ratio=0.3)) as stats:
        with pytest.raises(UnsupportedInputError, match="65 visual placeholder tokens"):
            model(**wrong)
        model(**inputs)
        torch.cuda.synchronize()
    assert len(stats.records) == 1
