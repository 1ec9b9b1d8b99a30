"""The language side: projections are those of the model's own layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.vitcop.models import build, make_inputs
from vitcop import ViTCoP, prune
from vitcop.budget import Geometry
from vitcop.tokens import LayerTokens


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
