"""What a forward is given: inputs that can't be pruned, and masks for each attention implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.vitcop.models import LAYERS, TEXT_FROM, build, make_inputs
from tests.vitcop.runs import BATCHES, run
from vitcop import UnsupportedInputError, ViTCoP, prune


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
