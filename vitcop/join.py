"""Rows of several clips in one pruned cache, so that one forward reads the weights once for all of them.

Clips keep different numbers of tokens, and pruned layers hold fewer than shallow ones, so the rows of a joint cache are
filled up on the left, stage by stage, to the longest row of that stage. The filling is masked; positions go on for each
row where its own prompt ended. All lengths are known without asking the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from vitcop.cache import LAYOUT, CacheLayout, check_cache, known_layout
from vitcop.errors import UnsupportedInputError


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the rows of several caches of the same model, in order.

    The caches may differ in everything that a prompt decides: frames, text, the tokens of each stage, even the layers
    at which tokens were dropped. They are left as they are.

    Args:
        caches: n >= 1 caches that prefills inside `prune` have filled, with B1 ... Bn rows; layer l of the k-th holds
            keys and values (Bk, heads, Skl, D).

    Returns:
        A cache of B1 + ... + Bn rows; layer l holds (rows, heads, max over k of Skl, D), filled up on the left.

    Raises:
        UnsupportedInputError: no cache, one that was not filled inside `prune`, or caches of different models.
    """
    layouts = [_own_layout(cache) for cache in caches]
    if not caches:
        raise UnsupportedInputError("there is no cache to join")
    # Neighbours are compared, which is enough: being of one model carries over from each to the next.
    for one, other in pairwise(caches):
        if _signature(one) != _signature(other):
            raise UnsupportedInputError(
                f"caches of different models can't be joined: (heads, width, type, device) by layer are "
                f"{_signature(one)} and {_signature(other)}"
            )
    # Layers form one stage of the joint cache where they form one stage of every single cache.
    columns = list(zip(*(layout.stage_of_layer for layout in layouts), strict=True))  # a tuple of stages for each layer
    stages = list(dict.fromkeys(columns))
    # Positions and tails are (B1 + ... + Bn,). Masks over the joint cache are as long as the longest prompt, `seen`.
    layout = CacheLayout(
        next_position=torch.cat([each.next_position for each in layouts]),
        tail=torch.cat([each.tail for each in layouts]),
        seen=max(each.seen for each in layouts),
        stage_of_layer=[stages.index(column) for column in columns],
    )
    for column in stages:
        # The stage of every single cache that this joint stage is made of; they may differ in length.
        parts = [(each, stage) for each, stage in zip(layouts, column, strict=True)]
        longest = max(each.cached[stage] for each, stage in parts)
        filling = [longest - each.cached[stage] for each, stage in parts]
        # Without filling and masks the joint stage needs no mask either, and attention keeps its fast path.
        masked = any(filling) or any(each.valid[stage] is not None for each, stage in parts)
        valid = [pad(_valid(each, stage), (count, 0)) for (each, stage), count in zip(parts, filling, strict=True)]
        layout.enter_stage(longest, torch.cat(valid) if masked else None, _joint_bias(parts, filling))
        # One number for each joint row: the filling from this join, and what the row brought from an earlier one.
        layout.padding.append(
            [
                count + own
                for (each, stage), count in zip(parts, filling, strict=True)
                for own in each.row_padding(stage)
            ]
        )
    joint = DynamicCache()
    for number in range(len(columns)):
        # (B1 + ... + Bn, heads, longest, D), zeros in the columns that are filled up
        keys = _stack([cache.layers[number].keys for cache in caches])
        values = _stack([cache.layers[number].values for cache in caches])
        joint.update(keys, values, number)
    setattr(joint, LAYOUT, layout)
    return joint


def select(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A cache with some rows of another one, in the order asked for; a row may be asked for several times.

    Columns that are filling in all of these rows are cut off, so a batch shrinks when its longest rows leave.

    Args:
        cache: B rows that prefills inside `prune` have filled; it is left as it is.
        rows: numbers of rows, in [0, B).

    Raises:
        UnsupportedInputError: a cache that was not filled inside `prune`.
        IndexError: no row is asked for, or one that is not there.
    """
    layout = _own_layout(cache)
    count = len(layout.next_position)
    if not rows or not all(0 <= row < count for row in rows):
        raise IndexError(f"rows must be numbers from 0 to {count - 1}, got {list(rows)}")
    # Row numbers come from the host, so only this index goes to the device and nothing comes back.
    index = torch.tensor(rows, device=layout.next_position.device)
    chosen = CacheLayout(
        next_position=layout.next_position[index],
        tail=layout.tail[index],
        seen=layout.seen,
        stage_of_layer=layout.stage_of_layer,
    )
    # For each stage, how many of its first columns no chosen row needs.
    cut = []
    for stage, length in enumerate(layout.cached):
        padding = [layout.row_padding(stage)[row] for row in rows]
        cut.append(min(padding))
        valid, bias = layout.valid[stage], layout.bias[stage]
        # (rows, length - cut): the mask and bias lose the same columns as keys and values below
        chosen.enter_stage(
            length - cut[stage],
            None if valid is None else valid[index, cut[stage] :],
            None if bias is None else bias[index, cut[stage] :],
        )
        chosen.padding.append([own - cut[stage] for own in padding])
    smaller = DynamicCache()
    for number, layer in enumerate(cache.layers):
        # (rows, heads, length - cut, D)
        start = cut[layout.stage_of_layer[number]]
        smaller.update(layer.keys[index, :, start:], layer.values[index, :, start:], number)
    setattr(smaller, LAYOUT, chosen)
    return smaller


def mask_of_new_tokens(cache: DynamicCache, valid: Tensor) -> Tensor:
    """The `attention_mask` with which rows of a pruned cache go on by different numbers of tokens.

    Args:
        valid: (B, n) bool, False at the filling of shorter rows.

    Returns:
        (B, seen + n), what a forward takes beside the n new tokens of each row.

    Raises:
        UnsupportedInputError: a cache that was not filled inside `prune`.
    """
    # Columns of the old tokens are all True: which of them are padding is in the cache's own layout.
    return pad(valid, (_own_layout(cache).seen, 0), value=True).long()


def _own_layout(cache: DynamicCache) -> CacheLayout:
    check_cache(cache)
    layout = known_layout(cache)
    if layout is None:
        raise UnsupportedInputError("only caches that a prefill inside prune has filled can be joined or selected from")
    # The cache may have been cropped or its rows repeated since the last forward; its layout follows it first.
    layout.match_length(cache)
    layout.match_batch(len(cache.layers[0].keys))
    return layout


def _signature(cache: DynamicCache) -> list[tuple[int, int, torch.dtype, torch.device]]:
    """Heads, width, dtype and device of each layer, which caches to be joined must share."""
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.keys.dtype, layer.keys.device) for layer in cache.layers]


def _valid(layout: CacheLayout, stage: int) -> Tensor:
    """(B, cached) True at tokens; a stage without a mask has no padding."""
    valid = layout.valid[stage]
    if valid is not None:
        return valid
    rows = len(layout.next_position)
    return torch.ones(rows, layout.cached[stage], dtype=torch.bool, device=layout.next_position.device)


def _joint_bias(parts: Sequence[tuple[CacheLayout, int]], filling: Sequence[int]) -> Tensor | None:
    """(rows, longest) the bias of a joint stage: 0 where a cache has none; None where none of them has one."""
    if all(layout.bias[stage] is None for layout, stage in parts):
        return None
    padded = []
    for (layout, stage), count in zip(parts, filling, strict=True):
        bias = layout.bias[stage]
        # (Bk, cached) zeros stand for "no bias", so that rows with and without one share a tensor
        own = torch.zeros(_valid(layout, stage).shape, device=layout.next_position.device) if bias is None else bias
        padded.append(pad(own, (count, 0)))
    return torch.cat(padded)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Keys or values (Bk, heads, Sk, D) of several caches as one (rows, heads, longest, D), zeros on the left."""
    longest = max(part.shape[2] for part in parts)
    stacked = parts[0].new_zeros(sum(map(len, parts)), parts[0].shape[1], longest, parts[0].shape[3])
    start = 0
    for part in parts:
        # Right-aligned, so that new tokens follow every row's last one in the same column.
        stacked[start : start + len(part), :, longest - part.shape[2] :] = part
        start += len(part)
    return stacked
