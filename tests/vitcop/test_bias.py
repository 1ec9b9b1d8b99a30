"""Attention in proportion to the tokens that a kept token stands for: equal to what as many tokens would get."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.vitcop.models import VIDEO, build, make_inputs, take_row
from vitcop import UnsupportedModelError, prune
from vitcop.cache import layout_of
from vitcop.methods import METHODS, Method, get_method
from vitcop.methods.base import Proportional
from vitcop.selection import Selection, kept_mass

NAMES = [name for name, method in METHODS.items() if issubclass(method, Proportional)]
BLIND = [name for name in NAMES if not METHODS[name].query_aware]
ASKED = torch.tensor([[20, 21, 22, 23, 24]])

model_of = functools.cache(build)


def biased(name: str, bias: float = 1.0) -> Method:
    return get_method(name)(retention_ratio=0.3, bias=bias)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def in_pieces(model: PreTrainedModel, inputs: dict[str, Tensor], method: Method) -> tuple[Tensor, Any]:
    """Logits (1, 5, vocabulary) of the tokens in `ASKED`: a question of three and two decoded ones; and the cache."""
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with prune(model, method):
        cache = model(**inputs).past_key_values
        parts = [model(input_ids=ids, past_key_values=cache).logits for ids in ASKED.split([3, 1, 1], dim=1)]
    return torch.cat(parts, dim=1), cache


# -- as many equal tokens ----------------------------------------------------------------------------------------------


def with_copies(model: PreTrainedModel, inputs: dict[str, Tensor], method: Method) -> Tensor:
    """What `in_pieces` gives, with every visual token there as often as its mass says and no bias anywhere.

    A token's copies see each other, so that they stay equal; what a stage drops becomes copies of what it counts for.
    """
    seen: list[dict[str, Any]] = []
    language = model.model.language_model
    handle = language.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    whole = {name: value for name, value in inputs.items() if name != "attention_mask"}
    whole["input_ids"] = torch.cat([inputs["input_ids"], ASKED], dim=1)
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 5))
    with prune(model, method) as stats:
        layout = layout_of(model(**whole).past_key_values)
    handle.remove()
    assert layout is not None and stats.last is not None
    is_video = whole["input_ids"][0] == VIDEO
    text, places = (~is_video).nonzero()[:, 0], is_video.nonzero()[:, 0]
    copies = [bias[0].exp().round().long() for bias in layout.bias if bias is not None]
    # Where the tokens of each stage stood in the prompt.
    stages = [torch.cat([text, places[index[0]]]).sort().values for index in stats.last.kept_index.values()]
    hidden = seen[0]["inputs_embeds"]
    cos, sin = language.rotary_emb(hidden, seen[0]["position_ids"])
    for number, layer in enumerate(language.layers):
        stage = layout.stage_of_layer[number]
        if number and stage != layout.stage_of_layer[number - 1]:
            stay = torch.isin(stages[stage - 1], stages[stage])
            hidden, cos, sin = (part[:, stay] for part in (hidden, cos, sin))
        hidden = layer_with_copies(layer, hidden, copies[stage], (cos, sin))
    return model.lm_head(language.norm(hidden[:, -5:]))


def layer_with_copies(layer: Any, hidden: Tensor, copies: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """A decoder layer on (1, S, D) tokens, of which token i is there `copies[i]` times at one position."""
    token = torch.arange(len(copies)).repeat_interleave(copies)
    mask = torch.where(token <= token[:, None], 0.0, torch.finfo(hidden.dtype).min)[None, None]
    output = layer(hidden[:, token], attention_mask=mask, position_embeddings=tuple(part[:, token] for part in rotary))
    output = output[0] if isinstance(output, tuple) else output
    first = copies.cumsum(0) - copies
    torch.testing.assert_close(output, output[:, first][:, token])  # copies stay equal
    return output[:, first]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_5_vl"])
@pytest.mark.parametrize("name", BLIND)
def test_a_mass_counts_as_many_equal_tokens(name: str, family: str, attention: str) -> None:
    model, inputs = build(family, attention), make_inputs(family)
    logits, _ = in_pieces(model, inputs, biased(name))
    close(logits, with_copies(model, inputs, biased(name)))
    assert not torch.allclose(logits, in_pieces(model, inputs, biased(name, 0.0))[0], atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_masses_of_every_stage_add_up_to_the_clip(name: str, family: str) -> None:
    model, inputs = model_of(family), make_inputs(family)
    with prune(model, biased(name)) as stats:
        layout = layout_of(model(**inputs).past_key_values)
    assert layout is not None and stats.last is not None
    text = stats.last.prompt_tokens
    for bias, cached in zip(layout.bias, layout.cached, strict=True):
        assert bias is not None and bias.shape == (1, cached)
        assert bias.exp().sum().item() - text == pytest.approx(stats.last.visual_tokens, abs=1e-3)
    half = layout_of(run(model, inputs, biased(name, 0.5)))
    assert half is not None and half.bias[0] is not None and layout.bias[0] is not None
    torch.testing.assert_close(2 * half.bias[0], layout.bias[0])


def run(model: PreTrainedModel, inputs: dict[str, Tensor], method: Method) -> Any:
    with prune(model, method):
        return model(**inputs).past_key_values


def test_mass_goes_where_a_token_is_merged_unless_it_is_said_where() -> None:
    mass = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    keep = torch.tensor([[1, 3]])
    into, elsewhere = torch.tensor([[0, 0, 1, 1, -1]]), torch.tensor([[1, 0, 0, 1, 0]])
    assert kept_mass(Selection(keep=keep), mass).tolist() == [[2, 4]]
    assert kept_mass(Selection(keep=keep, merge_into=into), mass).tolist() == [[3, 7]]
    assert kept_mass(Selection(keep=keep, merge_into=into, mass_into=elsewhere), mass).tolist() == [[10, 5]]
    assert kept_mass(Selection(keep=keep, merge_into=torch.full((1, 5), -1)), mass).tolist() == [[2, 4]]


# -- with the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLIND)
def test_a_prompt_in_pieces_says_what_the_whole_says(name: str, family: str) -> None:
    model, inputs = model_of(family), make_inputs(family)
    pieces, _ = in_pieces(model, inputs, biased(name))
    whole = {part: value for part, value in inputs.items() if part != "attention_mask"}
    whole["input_ids"] = torch.cat([inputs["input_ids"], ASKED], dim=1)
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 5))
    with prune(model, biased(name)):
        close(pieces, model(**whole).logits[:, -5:])


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_as_they_are_alone(name: str, family: str) -> None:
    model, inputs = model_of(family), make_inputs(family, (4, 11, 6))
    if "video_grid_thw" not in inputs:  # positions that don't count padding, as `generate` passes them
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with prune(model, biased(name)):
        together = model(**inputs).logits[:, -1]
        assert together.isfinite().all()
        for row in range(3):
            close(model(**take_row(inputs, row)).logits[:, -1], together[row : row + 1])


def test_copies_repeated_and_cropped_caches_keep_the_bias(family: str) -> None:
    model, inputs = model_of(family), make_inputs(family)
    expected, _ = in_pieces(model, inputs, biased("vitcop_video"))
    whole = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with prune(model, biased("vitcop_video")):
        cache = model(**whole).past_key_values
        copied, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
        model(input_ids=torch.tensor([[40, 41, 42]]), past_key_values=copied)
        copied.crop(-3)
        close(model(input_ids=ASKED, past_key_values=copied).logits, expected)
        repeated.batch_repeat_interleave(3)
        close(model(input_ids=ASKED.expand(3, -1), past_key_values=repeated).logits, expected.expand(3, -1, -1))
        close(model(input_ids=ASKED, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generation_goes_through(family: str, settings: dict[str, Any]) -> None:
    model, inputs = model_of(family), make_inputs(family, (5, 3))
    torch.manual_seed(0)
    with prune(model, biased("vitcop_video")) as stats:
        found = model.generate(**inputs, max_new_tokens=4, **settings)
    assert found.shape[1] == inputs["input_ids"].shape[1] + 4 and stats.last is not None


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_bfloat16(name: str) -> None:
    model, inputs = build("qwen2_5_vl").bfloat16(), make_inputs("qwen2_5_vl", (4, 9))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    with prune(model, biased(name)):
        logits = model(**inputs).logits[:, -1]
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


# -- refused, and off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_attention_that_takes_no_bias_is_named(name: str) -> None:
    model = build("llava")
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(
        UnsupportedModelError, match=rf"bias=0.5 of {name} .*'flash_attention_2'; use 'sdpa' or 'eager'"
    ):
        prune(model, biased(name, 0.5))
    prune(model, biased(name, 0.0))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_bias_masks_are_the_models_own(name: str) -> None:
    layout = layout_of(run(model_of("llava_next_video"), make_inputs("llava_next_video"), biased(name, 0.0)))
    assert layout is not None and set(layout.bias) == {None}


@pytest.mark.parametrize("bias", [-0.5, 2.0])
def test_a_bias_out_of_range_is_refused(bias: float) -> None:
    with pytest.raises(ValueError, match=rf"bias must be in \[0, 1\], got {bias}"):
        get_method("kmeans")(retention_ratio=0.5, bias=bias)


def test_methods_without_masses_have_no_bias() -> None:
    with pytest.raises(TypeError, match="bias"):
        get_method("fastv")(retention_ratio=0.5, bias=1.0)
