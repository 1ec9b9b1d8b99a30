"""Positions beyond the trained context, and positions numbered anew."""

import warnings

import pytest
import torch

from tests.vitcop.models import build, make_inputs
from vitcop import UnsupportedInputError, ViTCoP, get_method, prune

ONE_DIMENSIONAL = ["llava_onevision", "video_llava"]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_positions_beyond_the_trained_context_are_warned_of_with_the_limit(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    model.model.language_model.config.max_position_embeddings = 7
    with prune(model, ViTCoP(retention_ratio=0.5)), pytest.warns(UserWarning, match="fewer than 7"):
        model(**inputs)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_positions_within_the_trained_context_are_not(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with warnings.catch_warnings(), prune(model, ViTCoP(retention_ratio=0.5)):
        warnings.simplefilter("error")
        model(**inputs)


@pytest.mark.parametrize("family", ONE_DIMENSIONAL)
def test_compact_positions_are_those_of_a_prompt_of_the_kept_tokens(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    text = model.model.language_model
    entered: list[torch.Tensor] = []
    handle = text.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with prune(model, get_method("random")(retention_ratio=0.5), positions="compact"):
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:]
    handle.remove()

    cache, embeds, expected = None, entered[0], []
    for _ in range(4):
        output = text(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        expected.append(int(model.lm_head(output.last_hidden_state[:, -1]).argmax()))
        embeds = model.get_input_embeddings()(torch.tensor([[expected[-1]]]))
    assert generated.tolist() == expected


@pytest.mark.parametrize("family", ONE_DIMENSIONAL)
def test_compact_positions_of_a_padded_batch_are_those_of_its_rows(family: str) -> None:
    model, inputs = build(family), make_inputs(family, texts=(5, 2))
    method = ViTCoP(retention_ratio=0.4)
    with prune(model, method, positions="compact"):
        both = model(**inputs).logits[1, -1]
        padding = int((inputs["attention_mask"][1] == 0).sum())
        row = {name: value[1:] for name, value in inputs.items()}
        row = {
            name: value[:, padding:] if name in ("input_ids", "attention_mask") else value
            for name, value in row.items()
        }
        torch.testing.assert_close(model(**row).logits[0, -1], both, rtol=1e-4, atol=1e-4)


def test_m_rope_positions_are_not_numbered_anew() -> None:
    model, inputs = build("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    with (
        prune(model, ViTCoP(retention_ratio=0.5), positions="compact"),
        pytest.raises(UnsupportedInputError, match="M-RoPE"),
    ):
        model(**inputs)
