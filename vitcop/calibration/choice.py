"""Choose a method and its settings for a model without labels: by how little they change what it would say next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
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

Inputs = Mapping[str, Any]


def choose(
    model: PreTrainedModel,
    clips: Iterable[Sequence[Inputs]],
    retention_ratio: float,
    presets: Sequence[Preset] = PRESETS,
) -> MethodChoice:
    """The preset whose pruned model stays closest to the unpruned one, on a few clips without labels.

    Closeness is the mean, over clips and prompts, of KL(unpruned, pruned) between the distributions of the token that
    follows the prompt, in nats.

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
        full = _next_token(model, inputs)
        pruned = []
        for method in methods:
            with prune(model, method, vision=vision):
                pruned.append(_next_token(model, inputs))
        other = torch.stack(pruned)
        rows.append((full.exp() * (full - other)).sum(dim=-1))
    return torch.stack(rows).mean(dim=0)


def _next_token(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """(vocabulary,) log-probabilities of the token after the prompt, on the CPU."""
    return model(**inputs, logits_to_keep=1).logits[0, -1].double().log_softmax(dim=-1).cpu()
