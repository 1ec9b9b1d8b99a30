"""Measure, without labels, which key score marks the visual tokens that text will look at in one model.

The small key norms of ViTCoP mark what matters in some models and the background in others. For a few clips, this
computes at every layer the rank correlation between a key score of each visual token and the attention that the text
after the video pays to it from there on. The result is a profile for `ViTCoP(key_score="profile")`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitcop.budget import SHALLOW_AND_DEEP, scaled_layers
from vitcop.calibration.profiles import KEY_SCORES, Estimate, LayerProfile, Profile, StageProfile
from vitcop.families import Family, family_of
from vitcop.language import LanguageModel
from vitcop.ops.scores import attention_rows, key_distance, key_norm
from vitcop.selection import take, true_indices

LEAST_CLIPS = 4
RESAMPLES = 2000
SURE = 0.95
"""Share of bootstrap samples in which another layer than the paper's must be better to be recommended."""

Inputs = Mapping[str, Any]


def calibrate(model: PreTrainedModel, clips: Iterable[Iterable[Inputs]], name: str | None = None) -> Profile:
    """Measure a model's profile on a few clips.

    Args:
        model: an unmodified Hugging Face video language model.
        clips: for each clip the forward inputs of one prompt or more on it (`input_ids`, pixels, ...), batch 1.
        name: what to call the model; by default where it was loaded from.

    Raises:
        UnsupportedModelError: no adapter for this model.
        ValueError: fewer than `LEAST_CLIPS` clips, a batch, or a prompt without text after the video.
    """
    family = family_of(model)
    geometries, measured = [], []
    for prompts in clips:
        prompts = list(prompts)
        geometries.append(family.geometry(prompts[0]))
        measured.append(measure_clip(family, prompts))
    if len(measured) < LEAST_CLIPS:
        raise ValueError(f"{len(measured)} clips; to tell how far clips agree, calibrate on {LEAST_CLIPS} or more")
    first = geometries[0]
    return summarize(
        torch.stack(measured),
        model=name or model.config._name_or_path,
        model_type=model.config.model_type,
        frames=first.frames,
        visual_tokens=first.num_tokens,
    )


@torch.no_grad()
def measure_clip(family: Family, prompts: Iterable[Inputs]) -> Tensor:
    """Rank correlations (2, L - 1) of key norm and key distance with later text attention, for one clip.

    Column l - 1 has the keys of layer l - 1, as a stage before layer l reads them, and the attention of layers l and
    up, averaged over these layers, heads, text tokens after the video, and prompts.
    """
    watches = [watch_prefill(family, inputs) for inputs in prompts]
    attention = torch.stack([torch.stack(watch.attention) for watch in watches]).mean(dim=0)
    # Mean over layers l, l + 1, ...: the sum from the end, divided by the number of layers in it.
    later = attention.flip(0).cumsum(0) / torch.arange(1, len(attention) + 1, device=attention.device)[:, None]
    later = later.flip(0)[1:]
    scores = torch.stack((torch.stack(watches[0].norm)[:-1], torch.stack(watches[0].distance)[:-1]))
    return rank_correlation(scores, later.expand_as(scores)).cpu()


class Watch:
    """What one prefill shows at each layer: scores of the visual tokens' keys, and the attention text pays to them.

    Only the rows of the text tokens are computed, from the layer's own queries and keys.

    Args:
        visual: (1, V) positions of the visual tokens.
        rows: (1, Q) positions of the text tokens after them.

    Attributes:
        attention, norm, distance: (V,) for each layer, in order.
    """

    def __init__(self, language: LanguageModel, visual: Tensor, rows: Tensor) -> None:
        self.language, self.visual, self.rows = language, visual, rows
        self.attention: list[Tensor] = []
        self.norm: list[Tensor] = []
        self.distance: list[Tensor] = []

    def __call__(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        keys = self.language.rotated_keys(layer, hidden, (cos, sin))
        text = take(hidden, self.rows), (take(cos, self.rows), take(sin, self.rows))
        queries = self.language.rotated_queries(layer, *text)
        seen = torch.arange(hidden.shape[1], device=hidden.device) <= self.rows[..., None]
        rows = attention_rows(queries, keys, self.language.attention_scale(layer), seen[:, None])
        visual_keys = keys[:, :, self.visual[0]]
        self.attention.append(rows.mean(dim=(1, 2))[0, self.visual[0]])
        self.norm.append(key_norm(visual_keys)[0])
        self.distance.append(key_distance(visual_keys)[0])


def watch_prefill(family: Family, inputs: Inputs) -> Watch:
    """Run the unpruned model over one prompt and watch its layers."""
    ids = inputs["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"calibration takes one prompt at a time, got a batch of {len(ids)}")
    mask = family.placeholders(ids)
    places = true_indices(mask, int(mask.sum()))
    rows = torch.arange(int(places.max()) + 1, ids.shape[1], device=ids.device)[None]
    if rows.shape[1] == 0:
        raise ValueError("the prompt ends with the video; calibration needs text after it, such as a question")
    watch = Watch(family.language, places[:, family.token_offsets(family.geometry(inputs)).to(ids.device)], rows)
    handles = [
        layer.register_forward_pre_hook(functools.partial(watch, number), with_kwargs=True)
        for number, layer in enumerate(family.language.layers)
    ]
    try:
        family.base(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return watch


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation along the last axis, ties at their mean rank; 0 where one side is constant."""
    first, second = _centred_ranks(first), _centred_ranks(second)
    scale = first.norm(dim=-1) * second.norm(dim=-1)
    return (first * second).sum(dim=-1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def _centred_ranks(values: Tensor) -> Tensor:
    rows = [
        torch.unique(row, return_inverse=True, return_counts=True)[1:] for row in values.reshape(-1, values.shape[-1])
    ]
    ranks = torch.stack([(counts.cumsum(0) - (counts + 1) / 2)[inverse] for inverse, counts in rows])
    return (ranks - ranks.mean(dim=-1, keepdim=True)).double().view(values.shape)


def summarize(measured: Tensor, **described: Any) -> Profile:
    """A profile from the correlations (clips, 2, L - 1) of key norm and key distance; `described` names the model."""
    norm, distance = measured.unbind(dim=1)
    values = torch.stack((-norm, norm, distance))  # KEY_SCORES, clips, layers
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, len(measured), (RESAMPLES, len(measured)), generator=generator)
    means = values[:, samples].mean(dim=2)  # KEY_SCORES, samples, layers
    num_layers = measured.shape[2] + 1
    layers = tuple(
        _layer_profile(values[..., column], means[..., column], column + 1) for column in range(num_layers - 1)
    )
    shallow, deep = scaled_layers(SHALLOW_AND_DEEP, num_layers)
    return Profile(
        num_layers=num_layers,
        clips=len(measured),
        layers=layers,
        shallow=_stage(layers, means, shallow, range(1, max(1, num_layers // 8) + 1)),
        deep=_stage(layers, means, deep, range(max(shallow + 1, num_layers // 2), 7 * num_layers // 8 + 1)),
        **described,
    )


def _layer_profile(values: Tensor, means: Tensor, layer: int) -> LayerProfile:
    """From correlations (KEY_SCORES, clips) and bootstrap means (KEY_SCORES, samples) of one layer."""
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=1)
    estimates = {
        score: Estimate(
            mean=_round(values[row].mean()),
            spread=_round(values[row].std()),
            low=_round(low[row]),
            high=_round(high[row]),
            agreeing=_round((values[row] > 0).double().mean()),
        )
        for row, score in enumerate(KEY_SCORES)
    }
    return LayerProfile(layer=layer, **estimates)


def _stage(layers: tuple[LayerProfile, ...], means: Tensor, default: int, candidates: Iterable[int]) -> StageProfile:
    """The paper's layer with its best score, or the candidate that is surely better at predicting attention."""
    best = means.amax(dim=0)  # samples, layers

    def correlation(layer: int) -> float:
        return getattr(layers[layer - 1], layers[layer - 1].best).mean

    better = [layer for layer in candidates if (best[:, layer - 1] > best[:, default - 1]).double().mean() >= SURE]
    layer = max(better, key=correlation, default=default)
    score = layers[layer - 1].best
    winner = means[..., layer - 1].argmax(dim=0) == KEY_SCORES.index(score)
    return StageProfile(
        layer=layer, key_score=score, correlation=correlation(layer), sure=_round(winner.double().mean())
    )


def _round(value: Tensor) -> float:
    return round(float(value), 4)


def report(profile: Profile) -> str:
    """The profile as a table: mean rank correlation of each score at each layer, and what is recommended."""
    lines = [
        f"{profile.model}: {profile.clips} clips of {profile.frames} frames, {profile.visual_tokens} visual tokens",
        "rank correlation of a token's key score with the attention that text pays to it from the layer on",
        "before layer    small    large            (95 %)  clips > 0   distance            (95 %)  clips > 0",
    ]
    for layer in profile.layers:
        parts = [f"{layer.layer:12d}  {layer.small.mean:+7.3f}"]
        for estimate in (layer.large, layer.distance):
            interval = f"({estimate.low:+.3f} {estimate.high:+.3f})"
            parts.append(f"{estimate.mean:+7.3f}  {interval:>16}  {estimate.agreeing:9.0%}")
        lines.append("  ".join(parts))
    for name, stage in (("shallow", profile.shallow), ("deep", profile.deep)):
        lines.append(
            f"{name} stage: {stage.key_score} before layer {stage.layer}, correlation {stage.correlation:+.3f}, "
            f"best of the three in {stage.sure:.0%} of resamples"
        )
    if (choice := profile.choice) is not None:
        lines.append(f"divergence of the next token at {choice.retention_ratio:.0%} of the tokens, in nats")
        ranked = sorted(choice.divergences.items(), key=lambda item: item[1])
        lines += [f"{value:12.4f}  {name}" for name, value in ranked]
        lines.append(f"method: {choice.preset.name}, best of all in {choice.sure:.0%} of resamples")
    return "\n".join(lines)
