"""Methods that prune before the language model against vectors recorded from their published code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.vitcop.reference_checks import Case, Check, close, same_indices
from vitcop.methods.divprune import divprune_order
from vitcop.methods.evs import evs_scores
from vitcop.methods.fastvid import NEIGHBOURS, FastVID, Flavour
from vitcop.methods.flashvid import Diversity, FlashVID
from vitcop.methods.holitom import HoliTom, ratio_after_averaging, static_windows
from vitcop.methods.prumerge import take_in_neighbours
from vitcop.methods.vcast import curvature, vcast_select
from vitcop.methods.vidcom2 import steady_channels, vidcom2_likeness, vidcom2_select, vidcom2_shares
from vitcop.methods.visionzip import merged_selection, visionzip_select
from vitcop.ops.density import density_peaks
from vitcop.ops.quotas import meet_count
from vitcop.ops.segments import Segments, split_at_changes
from vitcop.ops.similarity import similarity_to_previous, unit
from vitcop.selection import apply_selection, take, top_k_in_order


def evs(case: Case) -> list[str]:
    frames = _frames(case)
    count = max(frames.shape[2], int(frames.shape[1] * frames.shape[2] * (1 - float(case["q"]))))
    keep = top_k_in_order(evs_scores(frames).flatten(1), count)[0]
    return _differing(
        n_retained=count == int(case["n_retained"]),
        kept=same_indices(keep, case["kept"]),
        per_frame=same_indices(_per_frame(keep, frames), case["per_frame"]),
    )


def vidcom2(case: Case) -> list[str]:
    frames, ratio = _frames(case), 1 - float(case["q"])
    to_clip, to_frame = vidcom2_likeness(frames)
    mask = vidcom2_select(to_clip, to_frame, ratio)
    count = max(frames.shape[1], int(to_clip[0].numel() * ratio))
    exact = meet_count(mask.flatten(1), -(to_clip + to_frame).flatten(1), count)
    published, exact = _kept(mask), _kept(exact)
    channels = case["video_embeds"][:, case["low_var_channels"]]
    return _differing(
        low_var_channels=same_indices(steady_channels(frames)[0].flatten(0, 1), channels),
        vid_score=close(to_clip[0], case["vid_score"]),
        frame_score=close(to_frame[0], case["frame_score"]),
        scales=close(vidcom2_shares(to_clip, ratio)[0], case["scales"]),
        kept_orig=same_indices(published, case["kept_orig"]),
        per_frame_orig=same_indices(_per_frame(published, frames), case["per_frame_orig"]),
        n_retained_vllm=count == int(case["n_retained_vllm"]),
        kept_vllm=same_indices(exact, case["kept_vllm"]),
        per_frame_vllm=same_indices(_per_frame(exact, frames), case["per_frame_vllm"]),
    )


def divprune(case: Case) -> list[str]:
    frames = _frames(case)
    count = round(float(case["ratio"]) * frames.shape[1] * frames.shape[2])
    order = divprune_order(frames, count)[0]
    keep = order.sort().values
    return _differing(
        selection_order=same_indices(order, case["selection_order"]),
        kept=same_indices(keep, case["kept"].sort().values),
        per_frame=same_indices(_per_frame(keep, frames), case["per_frame"]),
    )


def vcast(case: Case) -> list[str]:
    frames, temperature, least = _frames(case), float(case["budget_temp"]), int(case["min_k"])
    count = max(round(float(case["ratio"]) * frames.shape[1] * frames.shape[2]), least * frames.shape[1])
    keep = _kept(vcast_select(frames, count, temperature, least))
    bend = curvature(unit(frames.mean(dim=2)))[0]
    return _differing(
        curvature=close(bend, case["curvature"]),
        frame_weights=close((bend / temperature).softmax(dim=0), case["frame_weights"]),
        total_budget=count == int(case["total_budget"]),
        per_frame=same_indices(_per_frame(keep, frames), case["per_frame"]),
        kept=same_indices(keep, case["kept"]),
        deepstack0_kept=same_indices(case["deepstack0"][keep], case["deepstack0_kept"]),
    )


def visionzip(case: Case) -> list[str]:
    frames = _frames(case)
    attention, keys = case["cls_attn"].sum(dim=1)[None, :, 1:], case["metric"][None, :, 1:]
    number = torch.ones(frames.shape[1], dtype=torch.long)
    counts = number * case["dominant_num"], number * case["contextual_num"]
    dominant, target, joins = visionzip_select(attention, keys, *counts)
    selection = merged_selection(dominant | target, target, joins, int(sum(counts).sum()))
    features = apply_selection(selection, frames.flatten(1, 2))[0].unflatten(0, (len(number), -1))
    gathered = target[dominant | target].unflatten(0, features.shape[:2])
    return _differing(
        kept_dominant=same_indices(_kept(dominant), case["kept_dominant"].sort().values),
        kept_contextual=same_indices(_kept(target), case["kept_contextual"]),
        contextual_targets=same_indices(
            (target.nonzero()[:, 2] + 1).view_as(case["contextual_targets"]), case["contextual_targets"]
        ),
        kept=same_indices(selection.keep[0], case["kept"].sort().values),
        per_frame=same_indices(_per_frame(selection.keep[0], frames), case["per_frame"]),
        merged=close(features[~gathered], case["merged"][:, 1 : 1 + counts[0][0]].flatten(0, 1))
        and close(features[gathered], case["merged"][:, 1 + counts[0][0] :].flatten(0, 1)),
    )


def fastvid(case: Case) -> list[str]:
    salient, context, equal = _fastvid(case, "onevision")
    free = ~salient[0]
    score, _ = density_peaks(_frames(case)[0], free, NEIGHBOURS, NEIGHBOURS)
    return _differing(
        **equal,
        context_num_list=same_indices(context.sum(dim=2)[0], case["context_num_list"].long()),
        frame_salient_num=bool((salient.sum(dim=2) == case["frame_salient_num"]).all()),
        salient_kept=same_indices(_kept(salient), case["salient_kept"].flatten().sort().values),
        density_score=close(score[free].view_as(case["density_score"]), case["density_score"], 1e-4),
        is_salient=same_indices(salient.flatten()[_kept(salient | context)], case["is_salient"]),
    )


def fastvid_llavavideo(case: Case) -> list[str]:
    return _differing(**_fastvid(case, "video")[2])


def _fastvid(case: Case, flavour: Flavour) -> tuple[Tensor, Tensor, dict[str, bool]]:
    frames, ratio = _frames(case), float(case["ratio"])
    method = FastVID(
        retention_ratio=ratio,
        flavour=flavour,
        min_segments=int(case["dyseg_c"]),
        threshold=float(case["dyseg_tau"]),
        context_share=float(case["stprune_d"]),
        anchor_stride=int(case["dtm_p"]),
        beta=float(case["dtm_beta"]),
    )
    similarity = similarity_to_previous(case["frame_global_features"][None])
    segments = split_at_changes(similarity, method.threshold, method.min_segments)
    per_frame = int(frames.shape[2] * ratio)
    salient, context, features = method.choose(frames, case["frame_attn"][None], segments, per_frame)
    keep = _kept(salient | context)
    equal = {
        "similarity": close(similarity[0], case["similarity"]),
        "segment_sizes": same_indices(_lengths(segments), case["segment_sizes"]),
        "frame_retain_num": per_frame == int(case["frame_retain_num"]),
        "kept": same_indices(keep, case["kept"].sort().values),
        "per_frame": same_indices(_per_frame(keep, frames), case["per_frame"]),
    }
    if all(equal.values()):
        equal["merged"] = close(features.flatten(1, 2)[0, keep], case["merged"][case["kept"].argsort()], 1e-4)
    return salient, context, equal


def holitom(case: Case) -> list[str]:
    frames, ratio = _frames(case), float(case["ratio"])
    method = HoliTom(
        retention_ratio=ratio,
        threshold=float(case["tau"]),
        beta=float(case["beta"]),
        neighbours=int(case["K"]),
        longest=int(case["max_window_size"]),
    )
    similarity = similarity_to_previous(frames)
    windows, places = static_windows(similarity, method.threshold, method.longest)
    static, moving, features = method.choose(frames, case["attn"][None], ratio)
    begins = windows.place[0] == 0
    spans = torch.stack([windows.first[0][begins], windows.last[0][begins]], dim=1)
    keep, order = _kept(static | moving), case["kept"].argsort()
    reduced = (places.sum(dim=2) * (windows.place > 0)).sum()
    equal = {
        "feature_sim": close(similarity[0], case["feature_sim"]),
        "windows": same_indices(spans, case["windows"]),
        "total_reduced": float(reduced) == float(case["total_reduced"]),
        "adjusted_ratio": close(ratio_after_averaging(windows, places, ratio).view(()), case["adjusted_ratio"]),
        "n_static_per_window": same_indices(places.sum(dim=2)[0][begins], case["n_static_per_window"]),
        "kept": same_indices(keep, case["kept"][order]),
        "per_frame": same_indices(_per_frame(keep, frames), case["per_frame"]),
    }
    if all(equal.values()):
        equal["is_static"] = same_indices(static.flatten()[keep], case["is_static"][order])
        equal["merged"] = close(features.flatten(1, 2)[0, keep], case["merged"][order], 1e-4)
    return _differing(**equal)


def flashvid(case: Case) -> list[str]:
    return _flashvid(case, "attention_and_event", "v2") + _flashvid(case, "attention", "v1")


def _flashvid(case: Case, diversity: Diversity, prefix: str) -> list[str]:
    frames, ratio = _frames(case), float(case["ratio"])
    method = FlashVID(
        retention_ratio=ratio,
        diversity=diversity,
        alpha=float(case["alpha"]),
        temporal_threshold=float(case["temporal_threshold"]),
        segment_threshold=float(case["segment_threshold"]),
        min_segments=int(case["min_segment_num"]),
    )
    segments = method.segments(frames)
    per_frame = math.ceil(frames.shape[2] * ratio * float(case["expansion"]))
    picked, roots, merged = method.choose(frames, case["cls_attention"][None], segments, per_frame)
    # A token may be there twice, as a pick and as a centre; the pick comes second, whatever order it was recorded in.
    keep = torch.cat([_kept(roots), _kept(picked)])
    features = torch.cat([merged[roots], frames[picked]])
    order = keep.argsort(stable=True)
    kept, is_pick = case[f"{prefix}_kept"], case[f"{prefix}_is_adts"]
    theirs = (2 * kept + is_pick.long()).argsort()
    equal = {
        "segment_lengths": same_indices(_lengths(segments), case["segment_lengths"]),
        "n_adts": bool((picked.sum(dim=2) == case["n_adts"]).all()),
        "n_tstm": per_frame - int(picked[0, 0].sum()) == int(case["n_tstm"]),
        f"{prefix}_adts_kept": same_indices(_kept(picked), case[f"{prefix}_adts_kept"]),
        f"{prefix}_kept": same_indices(keep[order], kept[theirs]),
        f"{prefix}_per_frame": same_indices(_per_frame(keep, frames), case[f"{prefix}_per_frame"]),
    }
    if all(equal.values()):
        equal[f"{prefix}_is_adts"] = same_indices(order >= roots.sum(), is_pick[theirs])
        equal[f"{prefix}_merged"] = close(features[order], case[f"{prefix}_merged"][theirs], 1e-4)
    return _differing(**equal)


def flashvid_inner(case: Case) -> list[str]:
    visual = case["visual_mask"].bool()
    score = case["attn_last_row"].mean(dim=0)[visual]
    count = math.ceil(int(visual.sum()) * float(case["llm_retention_ratio"]))
    alive = (~visual).index_put((visual.nonzero().squeeze(1)[top_k_in_order(score, count)],), torch.tensor(True))
    return _differing(
        visual_score=close(score, case["visual_score"]),
        num_retained=count == int(case["num_retained"]),
        keep_index=same_indices(_kept(alive), case["keep_index"]),
        positions_out=same_indices(
            case["positions_in"][..., alive] if case["has_positions"] else _kept(alive), case["positions_out"]
        ),
    )


def prumerge(case: Case) -> list[str]:
    frames, keys = _frames(case), case["key"]
    count, width = frames.shape[2], keys.shape[2]
    logits = (case["query_cls"][:, None] @ keys.transpose(1, 2)).squeeze(1) * width**-0.5
    attention = logits.softmax(dim=1)[:, 1:]
    ratio = _share_of_outliers(attention) if case["if_adaptive"] else float(case["reduction_ratio"])
    number = int(count * ratio)
    index = attention.topk(number).indices
    if case["variant_plus"]:
        spaced = torch.arange(0, 575, int(int(1 / ratio) / 3))
        index = torch.cat([index, spaced[~torch.isin(spaced, index)][None]], dim=1)
    centres = torch.zeros_like(attention).bool().scatter_(1, index, True)
    merged, rest = take_in_neighbours(frames, keys[None, :, 1:], attention[None], centres[None], int(case["knn"]))
    merged = torch.cat([take(merged[0], index), rest[0, :, None]], dim=1)
    return _differing(
        cls_attn=close(attention, case["cls_attn"]),
        reduction_ratio=abs(ratio - float(case["reduction_ratio"])) < 1e-9,
        n_topk=number == int(case["n_topk"]),
        center_idx=same_indices(index, case["center_idx"]),
        kept=same_indices(_kept(centres), case["kept"]),
        per_frame=same_indices(centres.sum(dim=1), case["per_frame"]),
        merged=close(merged, case["merged"], 1e-4),
    )


def _share_of_outliers(attention: Tensor) -> float:
    """Share of attention values above the third quartile plus 1.5 times the distance between quartiles."""
    low, high = attention.flatten().double().quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return float((attention > high + 1.5 * (high - low)).double().mean())


def _lengths(segments: Segments) -> Tensor:
    """Lengths of a clip's runs."""
    return segments.length[0][segments.place[0] == 0]


def _frames(case: Case) -> Tensor:
    """The case's features as one clip (1, T, N, C)."""
    count = int(case["thw"][0])
    return case["video_embeds"].unflatten(0, (count, -1))[None]


def _kept(mask: Tensor) -> Tensor:
    """Flat indices of the True entries of a clip's mask."""
    return mask.flatten().nonzero().squeeze(1)


def _per_frame(keep: Tensor, frames: Tensor) -> Tensor:
    return (keep // frames.shape[2]).bincount(minlength=frames.shape[1])


def _differing(**equal: bool) -> list[str]:
    return [name for name, same in equal.items() if not same]


CHECKS: dict[str, Check] = {
    "divprune": divprune,
    "evs": evs,
    "fastvid": fastvid,
    "fastvid_llavavideo": fastvid_llavavideo,
    "flashvid": flashvid,
    "flashvid_inner": flashvid_inner,
    "holitom": holitom,
    "prumerge": prumerge,
    "vcast": vcast,
    "vidcom2": vidcom2,
    "visionzip": visionzip,
}
