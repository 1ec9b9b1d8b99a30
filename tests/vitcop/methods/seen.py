"""What methods inside the model are shown, and what they choose."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.vitcop.models import build, make_inputs
from vitcop import prune
from vitcop.budget import Geometry, Plan
from vitcop.methods import METHODS, Method
from vitcop.selection import Selection, take
from vitcop.tokens import LayerTokens

FAMILIES = ["llava_onevision", "qwen2_5_vl", "qwen3_vl"]
RATIO = 0.45
"""Within reach of every method on models of 5 layers."""
Seen = list[tuple[LayerTokens, Plan, Geometry, Selection]]
model_of = functools.cache(build)


@contextmanager
def watched(method: Method, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What the method sees and chooses inside the language model."""
    seen: Seen = []
    choose = type(method).select_layer

    def select_layer(self: Method, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        selection = choose(self, tokens, plan, geometry)
        seen.append((tokens, plan, geometry, selection))
        return selection

    with monkeypatch.context() as patch:
        patch.setattr(type(method), "select_layer", select_layer)
        yield seen


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor], method: Method) -> tuple[Tensor, list[int], list[int]]:
    """Logits (B, vocabulary) of the last token, each layer's cached visual tokens, and those that were planned."""
    with torch.no_grad(), prune(model, method) as stats:
        output = model(**inputs, logits_to_keep=1)
    assert stats.last is not None
    lengths = [layer.keys.shape[2] - stats.last.prompt_tokens for layer in output.past_key_values.layers]
    return output.logits[:, -1], lengths, list(stats.last.kept_per_layer)


def choices(
    model: PreTrainedModel, inputs: dict[str, Tensor], method: Method, patch: pytest.MonkeyPatch
) -> list[Tensor]:
    """The numbers (B, K) within the clip of the tokens kept at each stage inside the language model."""
    with watched(method, patch) as seen:
        prefill(model, inputs, method)
    assert seen
    return [take(tokens.index, selection.keep) for tokens, _, _, selection in seen]


def layer_tokens(family: str, name: str, patch: pytest.MonkeyPatch, texts: tuple[int, ...] = (4, 9)) -> LayerTokens:
    """What the method `name` sees at its first stage."""
    method = METHODS[name](retention_ratio=RATIO)
    with watched(method, patch) as seen:
        prefill(model_of(family), make_inputs(family, texts), method)
    return seen[0][0]
