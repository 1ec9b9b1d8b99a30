"""A prefill: pruning equals leaving tokens out by hand, before the model and at any layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from tests.vitcop.models import SETUPS, build, make_inputs
from tests.vitcop.runs import KeepAt, cached, run
from vitcop import ViTCoP, prune


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


def test_key_source(family: str) -> None:
    """Rotation turns all heads' keys alike, so only a norm on the keys (Qwen3) can make the two differ."""
    model, inputs = build(family), make_inputs(family)
    kept = []
    for source in ("cached", "before_norm"):
        with prune(model, ViTCoP(retention_ratio=0.3, key_source=source)) as stats:
            model(**inputs)
        kept.append([index.tolist() for index in stats.last.kept_index.values()])
    assert (kept[0] == kept[1]) == (family != "qwen3_vl")


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
