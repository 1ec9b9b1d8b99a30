"""Methods that prune inside the language model against vectors recorded from their published code.

A case becomes the `LayerTokens` that a model would show the method, with one recorded layer behind them; the method's
own `select_layer` then chooses, for the counts that the published code was given.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.vitcop.reference_checks import Case, Check, close, same_indices
from vitcop.budget import Geometry, Plan, shares_to_counts
from vitcop.language import LanguageModel, rotate
from vitcop.methods.base import Method
from vitcop.methods.dart import DART, take_least_similar
from vitcop.methods.expected_attention import ExpectedAttention
from vitcop.methods.fastv import FastV
from vitcop.methods.inside import last_token_attention
from vitcop.methods.keydiff import keydiff_scores
from vitcop.methods.knorm import knorm_scores
from vitcop.methods.pyramiddrop import PyramidDrop
from vitcop.methods.sparsevlm import rater_scores, raters, recycle, visual_scores
from vitcop.methods.sparsevlm_plus import SparseVLMPlus, best_heads, head_totals, mean_of_heads, rotary_weights
from vitcop.methods.vscan import VScan
from vitcop.selection import Selection, apply_selection, take, top_k_in_order
from vitcop.tokens import LayerTokens

GEOMETRY = Geometry(num_layers=32, frames=1, height=1, width=1)
"""Methods ask a geometry for the model's depth only, once the counts are given."""


class RecordedLayer(LanguageModel):
    """A language model of one layer: the recorded weights."""

    def __init__(self, case: Case, layer: int, stage: str = "") -> None:
        dim = int(case["head_dim"])
        attention = SimpleNamespace(head_dim=dim, scaling=dim**-0.5)
        for kind in ("q", "k"):
            if f"{stage}{kind}_proj_weight" in case:
                bias = case.get(f"{stage}{kind}_proj_bias")
                setattr(
                    attention, f"{kind}_proj", partial(linear, weight=case[f"{stage}{kind}_proj_weight"], bias=bias)
                )
        if "q_norm_weight" in case:
            attention.q_norm = partial(_rms_norm, case["q_norm_weight"], case["q_norm_eps"])
        norm, final = (
            partial(_rms_norm, case.get(name), case.get("rms_norm_eps"))
            for name in (f"{stage}input_layernorm_weight", "final_norm_weight")
        )
        block = SimpleNamespace(self_attn=attention, input_layernorm=norm)
        self.text = SimpleNamespace(layers={layer: block}, norm=final, rotary_emb=partial(_rotary, case))


def _rms_norm(weight: Tensor | None, epsilon: Tensor | None, hidden: Tensor) -> Tensor:
    """The norm with a recorded weight; without one, hidden states were recorded after it."""
    if weight is None:
        return hidden
    return hidden * (hidden.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight


def _rotary(case: Case, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    dim = int(case["head_dim"])
    theta = float(case.get("rope_theta", torch.tensor(10000.0)))
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = (positions[..., None] * frequency).repeat(*[1] * positions.dim(), 2)
    return angle.cos(), angle.sin()


def recorded_tokens(
    case: Case, language: RecordedLayer, layer: int, hidden: Tensor, visual: int, *, previous_keys: Tensor | None = None
) -> LayerTokens:
    """The tokens about to enter `layer`, in one row, of which `visual` follow the prefix.

    `hidden` (S, D) stands for the input of `layer` and of the layer before; that one's keys (G, S, d_h) are as given.
    """
    length, prefix = len(hidden), int(case["prefix_len"])
    rotary = language.rotary_at(hidden[None], torch.arange(length)[None])
    keys = torch.empty(1, 0, length, 0) if previous_keys is None else previous_keys[None]
    return LayerTokens(
        language=language,
        layer=layer,
        hidden=hidden[None],
        visual=torch.arange(prefix, prefix + visual)[None],
        index=torch.arange(visual)[None],
        labels=None,
        previous_keys=keys,
        previous_values=keys,
        previous_hidden=hidden[None],
        embeds=None,
        embeds_visual=None,
        valid=None,
        rotary=rotary,
        after=torch.tensor([length - prefix - visual]),
        next_position=torch.tensor([length]),
    )


def select(method: Method, tokens: LayerTokens, count: int) -> Selection:
    return method.select_layer(tokens, Plan(entering=tokens.visual.shape[1], layers={tokens.layer: count}), GEOMETRY)


def in_sequence(tokens: LayerTokens, selection: Selection) -> Tensor:
    """Ascending positions (S',) in the sequence of what stays: the text and the kept visual tokens."""
    alive = torch.ones(tokens.hidden.shape[1], dtype=torch.bool)
    alive[tokens.visual[0]] = False
    alive[tokens.visual[0][selection.keep[0]]] = True
    return alive.nonzero().flatten()


def fastv(case: Case) -> list[str]:
    layer, visual = int(case["agg_layer"]), int(case["visual_len"])
    language = RecordedLayer(case, layer - 1)
    hidden = case["hidden_layer_in"]
    keys = language.rotated_keys(layer - 1, hidden[None], language.rotary_at(hidden, torch.arange(len(hidden))[None]))[
        0
    ]
    tokens = recorded_tokens(case, language, layer, hidden, visual, previous_keys=keys)
    keep = in_sequence(tokens, select(FastV(retention_ratio=0.5), tokens, int(case["attention_rank"])))
    return _differing(
        keys=close(keys, case["keys"]),
        visual_score=close(last_token_attention(tokens, own_layer=False)[0], case["visual_score"]),
        keep_index=same_indices(keep, case["keep_index"]),
        positions_out=same_indices(keep, case["positions_out"]),
    )


def pyramiddrop(case: Case) -> list[str]:
    counts = shares_to_counts(int(case["s0_visual_in"]), case["ratio_list"].tolist()[1:])
    return _ranked_stages(case, PyramidDrop(retention_ratio=0.5), counts)


def vscan_llm(case: Case) -> list[str]:
    visual, count = case["image_token_list"].tolist()
    return _ranked_stages(case, VScan(retention_ratio=0.5), [min(count, visual)])


def _ranked_stages(case: Case, method: Method, counts: list[int]) -> list[str]:
    """Stages that rank by the coming layer. Positions are renumbered, as published; models keep the original ones."""
    differing, original = [], torch.arange(len(case["s0_hidden_in"]))
    for stage, count in enumerate(counts):
        recorded = _of_stage(case, stage)
        layer, visual = int(recorded["rank_layer"]), int(recorded["visual_in"])
        language = RecordedLayer(case, layer, f"s{stage}_")
        tokens = recorded_tokens(case, language, layer, recorded["hidden_in"], visual)
        query = rotate(language.queries(layer, tokens.hidden[:, -1:]), tuple(part[:, -1:] for part in tokens.rotary))
        keep = in_sequence(tokens, select(method, tokens, count))
        original = original[keep]
        differing += _differing(
            f"s{stage}_",
            query_last=close(query[0, :, 0], recorded["query_last"]),
            visual_kept=count == int(recorded["visual_kept"]),
            visual_score=close(last_token_attention(tokens, own_layer=True)[0], recorded["visual_score_derived"]),
            keep_local=same_indices(keep, recorded["keep_local"]),
            keep_original=same_indices(original, recorded["keep_original"]),
        )
    return differing


def dart(case: Case) -> list[str]:
    """The pivots take their turn in the order of a Python set, as published."""
    layer, prefix, visual = int(case["pruning_loc"]), int(case["prefix_len"]), int(case["visual_len"])
    number = {f"pivot_{kind}_tokens": int(case[f"pivot_{kind}_token"]) for kind in ("image", "text")}
    tokens = recorded_tokens(
        case, RecordedLayer(case, layer), layer, case["hidden_in"], visual, previous_keys=case["keys"]
    )
    pivot_visual, pivot_text = DART(retention_ratio=0.5, **number).pivots(tokens)
    places = torch.cat([pivot_visual[0] + prefix, pivot_text[0]]).tolist()
    order = torch.tensor(list(set(places)))
    share = int(visual * (1 - float(case["reduction_ratio"])) / sum(number.values()))
    after_turn = [
        take_least_similar(tokens, pivot_visual, order[None, :turn], [share] * turn)[0] + prefix
        for turn in range(len(order) + 1)
    ]
    picked = [torch.cat([case["pivot_visual"], *case["picked_per_pivot"][:turn]]) for turn in range(len(order) + 1)]
    keep = in_sequence(tokens, Selection(keep=after_turn[-1][None] - prefix))
    return _differing(
        pivot_visual=same_indices(pivot_visual[0] + prefix, case["pivot_visual"]),
        pivot_text=same_indices(pivot_text[0], case["pivot_text"]),
        pivot_order=same_indices(order, case["pivot_order"]),
        token_topk=share == int(case["token_topk"]),
        picked_per_pivot=all(same_indices(o, p.sort().values) for o, p in zip(after_turn, picked, strict=True)),
        keep_index=same_indices(keep, case["keep_index"]),
        positions_out=same_indices(keep, case["positions_out"]),
    )


def kvpress(case: Case) -> list[str]:
    """The scores rank the whole sequence, and each key head keeps its own part of it."""
    settings = {"future_positions": "n_future_positions", "sinks": "n_sink", "epsilon": "epsilon"}
    settings |= {"use_covariance": "use_covariance", "use_value_norm": "use_vnorm"}
    method = ExpectedAttention(retention_ratio=0.5, **{name: case[key].item() for name, key in settings.items()})
    tokens = recorded_tokens(
        case, RecordedLayer(case, 0), 1, case["hidden_states"], int(case["visual_len"]), previous_keys=case["keys"]
    )
    tokens = replace(tokens, previous_values=case["values"][None])
    scores = {
        "knorm": knorm_scores(tokens.previous_keys),
        "keydiff": keydiff_scores(tokens.previous_keys),
        "ea": method.scores(tokens),
    }
    length = len(case["hidden_states"])
    mean, covariance = method.future_queries(tokens, torch.arange(length)[None] >= method.sinks)
    count = int(length * (1 - float(case["compression_ratio"])))
    equal = {
        "n_kept": count == int(case["n_kept"]),
        "query_mean_roped": close(mean[0], case["query_mean_roped"]),
        "query_cov_roped": close(covariance[0], case.get("query_cov_roped", covariance[0])),
    }
    for name, score in scores.items():
        equal[f"{name}_score"] = close(score[0], case[f"{name}_score"])
        equal[f"{name}_kept"] = same_indices(top_k_in_order(score[0], count), case[f"{name}_kept"])
    return _differing(**equal)


def sparsevlm(case: Case) -> list[str]:
    """Merged tokens come after the kept ones in the recorded sequence; models leave them at their centres' places."""
    tokens, rater, differing = _raters(case)
    for stage in range(int(case["num_stages"])):
        recorded = _of_stage(case, stage)
        visual, prefix = int(recorded["visual_in"]), int(case["prefix_len"])
        kept = min(int(case["budgets"][stage]), visual - 1)
        # Only the first stage's layer is recorded; later stages begin at its attention.
        score = visual_scores(tokens, rater)[0] if stage == 0 else recorded["attn_rater_rows"].mean(dim=(0, 1))
        features = recorded["hidden_layer_out"][None, prefix : prefix + visual]
        ours = recycle(features, recorded["visual_score"][None], kept, recorded["noise"][None])
        selection = ours.selection(visual)
        centre = ours.candidates.gather(1, ours.centres)
        merged = apply_selection(selection, features)[0][torch.searchsorted(selection.keep[0], centre[0])]
        length = len(recorded["hidden_layer_out"])
        source = _published_order(prefix, ours.kept[0], centre.shape[1], prefix + visual, length)
        # A single cluster's centre is random in the published code, and what is merged does not depend on it.
        centres = ours.centres[0] if centre.shape[1] > 1 else recorded["center_in_candidates"]
        differing += _differing(
            f"s{stage}_",
            visual_kept=kept == int(recorded["visual_kept"]),
            visual_score=close(score, recorded["visual_score"]),
            kept_visual_local=same_indices(top_k_in_order(score, kept), recorded["kept_visual_local"]),
            merge_candidates_local=same_indices(ours.candidates[0], recorded["merge_candidates_local"]),
            cluster_num=centre.shape[1] == int(recorded["cluster_num"]),
            density=close(ours.density[0], recorded["density"]),
            cluster_score=close(ours.cluster_score[0], recorded["cluster_score"]),
            center_in_candidates=same_indices(centres, recorded["center_in_candidates"]),
            cluster_assign=same_indices(ours.cluster[0], recorded["cluster_assign"]),
            merged_tokens=close(merged, recorded["merged_tokens"]),
            sequence_source=same_indices(source, recorded["sequence_source"]),
        )
    return differing


def _published_order(prefix: int, kept: Tensor, merged: int, text: int, length: int) -> Tensor:
    """Sources of the tokens of the next layer: prefix, kept, merged (-1, -2, ...), and the text from `text` on."""
    return torch.cat([torch.arange(prefix), kept + prefix, -1 - torch.arange(merged), torch.arange(text, length)])


def sparsevlm_plus(case: Case) -> list[str]:
    tokens, rater, differing = _raters(case)
    recorded = _of_stage(case, 0)
    rows = int(recorded["text_start"]) + case["rater_index"][None]
    total = head_totals(tokens, rater)
    heads = best_heads(total, len(recorded["heads_selected"]))
    method, kept = SparseVLMPlus(retention_ratio=0.5, heads=heads.shape[1]), int(recorded["visual_kept"])
    selection = select(method, tokens, kept)
    keep, weights = in_sequence(tokens, selection), rotary_weights(tokens, rows)[0]
    return differing + _differing(
        "s0_",
        visual_kept=kept == min(int(case["budgets"][0]), tokens.visual.shape[1] - 1),
        rope_weights_rater_rows=close(weights, recorded.get("rope_weights_rater_rows", weights)),
        head_sums=close(total.sum(dim=2)[0], recorded["head_sums"], 1e-4),
        heads_selected=same_indices(heads[0], recorded["heads_selected"].sort().values),
        visual_score=close(mean_of_heads(total, heads, rater)[0], recorded["visual_score"], 1e-4),
        kept_visual_local=same_indices(selection.keep[0], recorded["kept_visual_local"]),
        sequence_source=same_indices(keep, recorded["sequence_source"]),
        positions_out=same_indices(keep, recorded["positions_out"]),
    )


def _raters(case: Case) -> tuple[LayerTokens, Tensor, list[str]]:
    """The tokens of the first stage, its raters (1, T), and what of the raters differs."""
    first = _of_stage(case, 0)
    layer, visual, hidden = int(first["layer"]), int(first["visual_in"]), first["hidden_layer_in"]
    language = RecordedLayer(case, layer, "s0_")
    keys = language.rotated_keys(layer, hidden[None], language.rotary_at(hidden, torch.arange(len(hidden))[None]))[0]
    tokens = recorded_tokens(case, language, layer + 1, hidden, visual, previous_keys=keys)
    tokens = replace(tokens, embeds=case["input_embeds"][None], embeds_visual=tokens.visual)
    suffix = len(case["rater_score"])
    embeds = case["input_embeds"][None]
    score = rater_scores(take(embeds, tokens.visual), embeds[:, -suffix:], tokens.question[:, -suffix:])
    rater, rows = raters(tokens), int(first["text_start"]) + case["rater_index"][None]
    differing = _differing(
        rater_score=close(score[0], case["rater_score"]),
        rater_index=same_indices(rater[0, -suffix:].nonzero().flatten(), case["rater_index"]),
        attn_rater_rows=close(tokens.attention_to_visual(rows, own_layer=False)[0], first["attn_rater_rows"]),
    )
    return tokens, rater, differing


def _of_stage(case: Case, stage: int) -> dict[str, Tensor]:
    return {name.removeprefix(f"s{stage}_"): value for name, value in case.items()}


def _differing(prefix: str = "", **equal: bool) -> list[str]:
    return [prefix + name for name, same in equal.items() if not same]


CHECKS: dict[str, Check] = {
    check.__name__: check for check in (dart, fastv, kvpress, pyramiddrop, sparsevlm, sparsevlm_plus, vscan_llm)
}
