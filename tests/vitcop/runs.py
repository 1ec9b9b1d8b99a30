"""Running a tiny model step by step, and what is read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel

from tests.vitcop.models import TEXT_FROM
from vitcop import ViTCoP
from vitcop.budget import Geometry, Plan
from vitcop.methods.base import Method
from vitcop.selection import Selection, top_k_in_order
from vitcop.tokens import LayerTokens, VisualTokens

BATCHES = [(5,), (6, 3, 1)]
STEPS = 3
METHOD = ViTCoP(retention_ratio=0.3)
FEW = ["llava_onevision", "qwen2_5_vl", "qwen3_vl"]


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


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int = 6, **settings: Any) -> Tensor:
    """The new tokens (rows, tokens); the same random numbers every time."""
    torch.manual_seed(11)
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
    return output[:, inputs["input_ids"].shape[1] :]


def next_logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (B, vocabulary) after `ids` (B, n), which follow what the cache holds; positions are left to the cache."""
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def greedy_by_hand(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, DynamicCache]:
    """Greedy decoding by forwards of one token, of unpadded prompts."""
    plain = {name: value for name, value in inputs.items() if name != "attention_mask"}
    output = model(**plain, use_cache=True, logits_to_keep=1)
    cache, chosen = output.past_key_values, [output.logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(tokens - 1):
        chosen.append(next_logits(model, chosen[-1], cache).argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1), cache
