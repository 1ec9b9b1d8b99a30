"""Choose a method and its settings for a model without labels: by how little they change what it would say next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vitcop.calibration.profiles import MethodChoice, Preset
from vitcop.errors import UnsupportedModelError
from vitcop.families import family_of
from vitcop.methods import Method, get_method
from vitcop.pruning import prune
from vitcop.vision import VisionCache

SCHEDULES: tuple[dict[str, float], ...] = (
    {},
    {"entering_share": 1.25, "deep_share": 0.2},
    {"entering_share": 1.0, "deep_share": 1.0},
)
"""Tokens of the three stages of `vitcop_video`: 1.5 : 1 : 0.5, less in the deep one, and all dropped at once."""
PRESETS: tuple[Preset, ...] = (
    *(Preset(method="vitcop", options={"key_score": score}) for score in ("small", "large", "distance")),
    *(
        Preset(method="vitcop_video", options=schedule | motion | bias)
        for schedule in SCHEDULES
        for motion in ({}, {"motion": 0.2})
        for bias in ({}, {"bias": 0.5}, {"bias": 1.0})
    ),
)
"""What is tried: the key scores of published ViTCoP; schedule, share of motion and bias of its variant for video."""
RESAMPLES = 2000
ANSWER_TOKENS = 8
"""Tokens of an answer of which the distributions are compared."""

Inputs = Mapping[str, Any]


def choose(
    model: PreTrainedModel,
    clips: Iterable[Sequence[Inputs]],
    retention_ratio: float,
    presets: Sequence[Preset] = PRESETS,
) -> MethodChoice:
    """The preset whose pruned model stays closest to the unpruned one, on a few clips without labels.

    Closeness is the mean, over clips, prompts and the tokens of the unpruned model's greedy answer, of KL(unpruned,
    pruned) between the distributions of the next token, in nats.

    Args:
        clips: for each clip the forward inputs of one prompt or more on it, batch 1; they share the clip's pixels.
        presets: those with a bias are left out where the model's attention takes none.

    Raises:
        UnsupportedModelError: no adapter for this model, or it takes none of the presets.
        UnreachableBudgetError: a preset can't keep so little.
        ValueError: there are no clips.
    """
    family_of(model)
    possible = [(preset, method) for preset in presets if (method := _bound(preset, model, retention_ratio))]
    if not possible:
        raise UnsupportedModelError(f"none of the {len(presets)} presets runs with this model's attention")
    measured = [_clip_divergences(model, prompts, [method for _, method in possible]) for prompts in clips]
    if not measured:
        raise ValueError("there are no clips to choose on")
    values = torch.stack(measured)  # (clips, presets)
    samples = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    best = int(values.mean(dim=0).argmin())
    winners = values[samples].mean(dim=1).argmin(dim=1)  # (resamples,)
    names = [preset.name for preset, _ in possible]
    return MethodChoice(
        preset=possible[best][0],
        retention_ratio=retention_ratio,
        sure=round(float((winners == best).double().mean()), 4),
        divergences=dict(zip(names, (round(value, 6) for value in values.mean(dim=0).tolist()), strict=True)),
    )


def _bound(preset: Preset, model: PreTrainedModel, retention_ratio: float) -> Method | None:
    """The preset as a method for the model; None where the model's attention takes no bias."""
    method = get_method(preset.method)(retention_ratio=retention_ratio, **preset.options)
    if not method.bias:
        return method
    try:
        return method.bind(model)
    except UnsupportedModelError:
        return None


@torch.no_grad()
def _clip_divergences(model: PreTrainedModel, prompts: Sequence[Inputs], methods: Sequence[Method]) -> Tensor:
    """(methods,) mean over the prompts on one clip of the divergence that each method brings."""
    vision, rows = VisionCache(), []
    for inputs in prompts:
        answer, full = _answer(model, inputs)
        pruned = []
        for method in methods:
            with prune(model, method, vision=vision):
                pruned.append(_distributions(model, inputs, answer))
        other = torch.stack(pruned)  # (methods, T, vocabulary)
        rows.append((full.exp() * (full - other)).sum(dim=-1).mean(dim=-1))
    return torch.stack(rows).mean(dim=0)


def _answer(model: PreTrainedModel, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The model's greedy answer (1, T), T <= `ANSWER_TOKENS`, and log-probabilities (T, vocabulary) of its tokens.

    These come from one forward over all of it, whose positions a pruned cache continues in every family.
    """
    ids = inputs["input_ids"]
    words = torch.arange(model.config.get_text_config().vocab_size, device=ids.device)
    placeholders = words[family_of(model).placeholders(words[None])[0]].tolist()
    found = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, suppress_tokens=placeholders)
    answer = found[:, ids.shape[1] :]
    # What ends the answer is judged, too, but nothing follows it.
    read = answer.shape[1] - 1
    whole = {**inputs, "input_ids": torch.cat([ids, answer[:, :read]], dim=1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in whole:
            whole[name] = pad(whole[name], (0, read), value=value)
    return answer, _log_probabilities(model(**whole, logits_to_keep=read + 1).logits)


def _distributions(model: PreTrainedModel, inputs: Inputs, answer: Tensor) -> Tensor:
    """Log-probabilities (T, vocabulary) of the tokens of an answer (1, T), after a prompt and each other."""
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1:]
    if answer.shape[1] > 1:
        after = model(input_ids=answer[:, :-1], past_key_values=output.past_key_values).logits
        logits = torch.cat([logits, after], dim=1)
    return _log_probabilities(logits)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits[0].double().log_softmax(dim=-1).cpu()
