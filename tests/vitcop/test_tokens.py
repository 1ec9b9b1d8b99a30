"""What methods get to look at inside the model: attention rows, the question, the last token."""

from __future__ import annotations

import pytest
import torch

from tests.vitcop.methods.seen import FAMILIES, RATIO, layer_tokens, model_of, prefill, watched
from tests.vitcop.models import SETUPS, build, make_inputs
from vitcop.methods import FastV, Method, PyramidDrop
from vitcop.methods.inside import last_token_attention


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "back"), [(FastV, 1), (PyramidDrop, 0)])
def test_scores_are_the_models_own_attention(
    method: type[Method], back: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastV reads the layer just run, PyramidDrop the layer to come; key heads are shared by query heads."""
    model, inputs = build(family, "eager"), make_inputs(family, (4, 9))
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    with watched(method(retention_ratio=RATIO), monkeypatch) as seen:
        prefill(model, inputs, method(retention_ratio=RATIO))
    tokens = seen[0][0]
    theirs = maps[tokens.layer - back][:, :, -1].mean(dim=1).gather(1, tokens.visual)
    torch.testing.assert_close(last_token_attention(tokens, own_layer=not back), theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_question_is_the_text_after_the_video(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = layer_tokens(family, "dart", monkeypatch)
    length = tokens.hidden.shape[1]
    end = 1 if SETUPS[family].between else 0  # the last frame's closing token
    for row, text in enumerate((4, 9)):
        assert tokens.question[row].nonzero().flatten().tolist() == list(range(length - text - end, length))
    assert tokens.last.flatten().tolist() == [length - 1] * 2


def test_the_last_token_is_found_before_padding_on_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("llava_onevision", (5, 5))
    inputs["attention_mask"][1, -2:] = 0
    with watched(FastV(retention_ratio=RATIO), monkeypatch) as seen:
        prefill(model_of("llava_onevision"), inputs, FastV(retention_ratio=RATIO))
    tokens = seen[0][0]
    length = tokens.hidden.shape[1]
    assert tokens.last.flatten().tolist() == [length - 1, length - 3]
    assert tokens.question.sum(dim=1).tolist() == [5, 3]


def test_the_next_position_follows_the_text_before_padding_on_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    family, method = "qwen2_5_vl", FastV(retention_ratio=RATIO)
    inputs = make_inputs(family, (5, 5))
    alone = {
        name: value[:, :-2] if value.shape == inputs["input_ids"].shape else value for name, value in inputs.items()
    }
    inputs["attention_mask"][1, -2:] = 0
    with watched(method, monkeypatch) as seen:
        prefill(model_of(family), inputs, method)
        prefill(model_of(family), alone, method)
    assert seen[0][0].next_position[1] == seen[1][0].next_position[1]
