"""The layout of a pruned KV cache. It travels with the cache, so that any later forward can go on from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from vitcop.errors import UnsupportedInputError
from vitcop.families import Family
from vitcop.inputs import Args, Call, Kwargs, check_mask, hidden_states, holds, stage_mask, text_inputs
from vitcop.language import KVCache
from vitcop.stats import PrefillRecord

LAYOUT, UNPRUNED_LAYOUT, RECORD = "vitcop_layout", "vitcop_unpruned_layout", "vitcop_record"
"""Attributes of a cache that a prefill inside `prune` has filled; copies of the cache have them too.

A cache from which nothing was pruned needs no help: the model goes on from it exactly as without `prune`. What is
known of its layout is there for `join` and `select`.
"""


def layout_of(cache: KVCache | None) -> CacheLayout | None:
    """The layout by which a forward goes on from a cache; None if the model goes on by itself."""
    return getattr(cache, LAYOUT, None)


def known_layout(cache: KVCache | None) -> CacheLayout | None:
    """What is known of a cache's layout, whether it was pruned or not; None if it was not filled inside `prune`."""
    return layout_of(cache) or getattr(cache, UNPRUNED_LAYOUT, None)


def record_of(cache: KVCache | None) -> PrefillRecord | None:
    """What the prefill that filled a cache kept and cost; None if that was not a clip's prefill inside `prune`."""
    return getattr(cache, RECORD, None)


@dataclass
class CacheLayout:
    """Lengths, padding and positions of a cache whose layers hold different numbers of tokens.

    Layers between two pruning stages hold the same tokens, so everything is kept once for each stage.

    Attributes:
        stage_of_layer: stage of each layer, from 0, as the plan has them.
        valid: for each stage (B, cached) bool, False at padding; None if the prompt came without a mask.
        bias: for each stage (B, cached), what is added to the logits of these tokens; None if nothing is.
        cached: for each stage, the tokens in the cache.
        seen: tokens of the unpruned sequence so far.
        next_position: (B,) position of the next token.
        tail: (B,) how many of the last tokens may be taken back: none that a visual token or a selection depends on.
        padding: for each stage, how many of the first columns are filling in each of the B rows, as far as that is
            known without asking the device; empty where the rows were never joined with longer ones.
    """

    next_position: Tensor
    tail: Tensor
    seen: int
    stage_of_layer: Sequence[int]
    cached: list[int] = field(default_factory=list)
    valid: list[Tensor | None] = field(default_factory=list)
    bias: list[Tensor | None] = field(default_factory=list)
    padding: list[list[int]] = field(default_factory=list)

    def row_padding(self, stage: int) -> list[int]:
        """How many of the first columns of a stage are filling, for each row."""
        return self.padding[stage] if self.padding else [0] * len(self.next_position)

    def enter_stage(self, length: int, valid: Tensor | None, bias: Tensor | None) -> None:
        """Note, in order of stages during the prefill, that the layers of the next stage cache `length` tokens."""
        self.cached.append(length)
        self.valid.append(valid)
        self.bias.append(bias)

    @property
    def per_layer(self) -> tuple[int, ...]:
        """Tokens that the cache of each layer holds."""
        return tuple(self.cached[stage] for stage in self.stage_of_layer)

    def match_length(self, cache: KVCache) -> None:
        """Follow a cache that lost its last tokens (`crop`, assisted decoding).

        Raises:
            UnsupportedInputError: more was cut than the text at the end, or the layers differ in what they lost.
        """
        lengths = [cache.get_seq_length(layer) for layer in range(len(self.stage_of_layer))]
        expected = list(self.per_layer)
        # All layers must have lost the same number of tokens; the first layer tells how many.
        lost = expected[0] - lengths[0]
        alike = lengths == [length - lost for length in expected]
        if not alike or lost < 0 or (lost and lost > int(self.tail.min())):
            raise UnsupportedInputError(
                f"the pruned cache was changed from outside (lengths {lengths}, expected {expected}); it can lose text "
                "at its end, in all layers alike, that no visual token was selected by"
            )
        if lost:
            self._take_back(lost)

    def _take_back(self, count: int) -> None:
        self.valid = [None if mask is None else mask[:, :-count] for mask in self.valid]
        self.bias = [None if bias is None else bias[:, :-count] for bias in self.bias]
        self.cached = [length - count for length in self.cached]
        self.seen -= count
        self.next_position = self.next_position - count
        self.tail = self.tail - count

    def match_batch(self, batch: int) -> None:
        """Follow a cache whose rows were repeated (`batch_repeat_interleave`)."""
        rows = len(self.next_position)
        if batch == rows:
            return
        if batch % rows:
            raise UnsupportedInputError(f"the cache was pruned for {rows} rows, the input has {batch}")
        # `generate` repeats each row in place (beams, returned sequences), so all that is kept by row does, too.
        repeats = batch // rows
        self.next_position = self.next_position.repeat_interleave(repeats, dim=0)
        self.tail = self.tail.repeat_interleave(repeats, dim=0)
        self.padding = [[count for count in counts for _ in range(repeats)] for counts in self.padding]
        self.valid = [None if mask is None else mask.repeat_interleave(repeats, dim=0) for mask in self.valid]
        self.bias = [None if bias is None else bias.repeat_interleave(repeats, dim=0) for bias in self.bias]

    def new_tokens(self, passed: int, length: int | None) -> int:
        """How many of the `passed` last tokens are new: all, or what of a conversation's `length` was not seen yet.

        `generate` counts what is old by the first layer's cache, which is shorter than what was seen; when it goes on
        with a whole conversation, it passes too many.
        """
        count = passed if length is None else length - self.seen
        if not 1 <= count <= passed:
            raise UnsupportedInputError(
                f"the cache has seen {self.seen} tokens; the input must hold those and at least one more "
                f"(or, without the old ones, an attention_mask over all), got {passed} tokens of which {count} are new"
            )
        return count

    def append(self, batch: int, count: int, new_valid: Tensor | None) -> Tensor:
        """Account for `count` tokens that the coming forward adds to every layer.

        Args:
            new_valid: (B, count) bool or None, False at padding.

        Returns:
            (B, count) their positions, which go on where the cache ends.
        """
        ones = functools.partial(torch.ones, dtype=torch.bool, device=self.next_position.device)
        new = ones(batch, count) if new_valid is None else new_valid
        if new_valid is not None or self.valid[0] is not None:
            # A stage that came without a mask has no padding.
            # (B, cached + count) for each stage
            old = [ones(batch, n) if m is None else m for m, n in zip(self.valid, self.cached, strict=True)]
            self.valid = [torch.cat((mask, new), dim=1) for mask in old]
        # (B, cached + count): text tokens stand for themselves, so their logits get 0
        self.bias = [None if bias is None else pad(bias, (0, count)) for bias in self.bias]
        # Positions count tokens only; padding repeats the position before it.
        position_ids = (self.next_position[:, None] - 1 + new.cumsum(dim=1)).clamp(min=0)
        self.cached = [length + count for length in self.cached]
        self.seen += count
        self.tail = self.tail + count
        self.next_position = position_ids[:, -1] + 1
        return position_ids


def holds_any_lengths(cache: KVCache) -> bool:
    """Whether every layer of a cache may have its own length."""
    # Exact types: sliding-window and quantized layers are DynamicLayers too, but drop or pack their tokens.
    plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return plain and not getattr(cache, "is_compileable", False) and not getattr(cache, "offloading", False)


def check_cache(cache: KVCache) -> None:
    """Raise UnsupportedInputError unless every layer of the cache may have its own length."""
    if not holds_any_lengths(cache):
        raise UnsupportedInputError(
            f"{type(cache).__name__} can't hold layers of different lengths; use the default DynamicCache "
            "(no cache_implementation such as 'static', 'quantized' or 'offloaded')"
        )


@dataclass
class Continuation:
    """A forward that goes on from a pruned cache: made when it begins, dropped when it ends.

    Attributes:
        masks: attention mask of each stage but the first, whose mask the model makes itself where there is no bias.
    """

    family: Family
    cache: KVCache
    layout: CacheLayout
    masks: dict[int, Any] = field(default_factory=dict)

    def enter(self, inputs: Kwargs, visual: Kwargs) -> Kwargs:
        """The forward's inputs with its true new tokens, their positions and a mask over what is cached.

        Args:
            inputs: as the caller or `generate` passed them; their tokens may begin with some that were seen before.
            visual: the visual inputs among them, also those that `generate` holds back.

        Raises:
            UnsupportedInputError: a new video, or tokens that don't go on where the cache ends.
        """
        # Text may come as ids or, from prompts embedded by the caller, as (B, n, D); both count tokens on axis 1.
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        tokens, mask = inputs[name], inputs.get("attention_mask")
        check_mask(mask)
        # The cache may have been cropped or repeated since the last forward.
        self.layout.match_length(self.cache)
        self.layout.match_batch(len(tokens))
        # `generate` may pass the whole conversation; how long it is tells which of its tokens are new.
        length = (inputs.get("mm_encoder_outputs") or {}).get("length") if mask is None else mask.shape[1]
        count = self.layout.new_tokens(tokens.shape[1], length)
        tokens = tokens[:, -count:]
        # Pixels of the old videos may come along; it is new placeholders that tell a new one.
        has_pixels = name == "input_ids" and self.family.pixels(visual) is not None
        if has_pixels and not holds(~self.family.placeholders(tokens).any()):
            raise UnsupportedInputError(
                "a video after a cached prompt can't be pruned; start a conversation with its videos"
            )
        position_ids = self.layout.append(len(tokens), count, None if mask is None else mask[:, -count:].bool())
        # The model makes the first stage's causal mask from this one; later stages get theirs before each layer.
        return text_inputs(inputs) | {
            name: tokens,
            "position_ids": position_ids,
            "attention_mask": self.layout.valid[0],
        }

    def before_layer(self, layer: int, args: Args, kwargs: Kwargs) -> Call | None:
        """Give a layer the mask of what its own cache holds."""
        stage = self.layout.stage_of_layer[layer]
        valid, bias = self.layout.valid[stage], self.layout.bias[stage]
        if stage == 0 and bias is None:
            return None
        # Layers of one stage share their mask, so it is made at the first of them.
        if stage not in self.masks:
            config = self.family.language.config
            self.masks[stage] = stage_mask(config, hidden_states(args, kwargs), valid, self.cache, layer, bias)
        return args, kwargs | {"attention_mask": self.masks[stage]}
