"""What a pruned KV cache holds; travels with the cache, so that any later forward can go on from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vitcop.errors import UnsupportedInputError

ATTRIBUTE = "vitcop_layout"


@dataclass
class CacheLayout:
    """Lengths, padding and positions of a cache whose layers hold different numbers of tokens.

    Layers between two pruning stages hold the same tokens, so everything is kept once for each stage.

    Attributes:
        stage_of_layer: stage of each layer.
        valid: for each stage (B, cached) bool, False at padding; None if the prompt came without a mask.
        cached: for each stage, the tokens in the cache.
        seen: tokens of the unpruned sequence so far.
        next_position: (B,) position of the next token.
        tail: (B,) how many of the last tokens may be taken back: none that a visual token or a selection depends on.
    """

    next_position: Tensor
    tail: Tensor
    seen: int
    stage_of_layer: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    valid: list[Tensor | None] = field(default_factory=list)

    def enter_layer(self, length: int, valid: Tensor | None) -> None:
        """Note, in order of layers during the prefill, that the next layer caches `length` tokens."""
        if not self.cached or self.cached[-1] != length:
            self.cached.append(length)
            self.valid.append(valid)
        self.stage_of_layer.append(len(self.cached) - 1)

    def match_length(self, cache: Cache) -> None:
        """Follow a cache that lost its last tokens (`crop`, assisted decoding).

        Raises:
            UnsupportedInputError: more was cut than the text at the end, or the layers differ in what they lost.
        """
        lengths = [cache.get_seq_length(layer) for layer in range(len(self.stage_of_layer))]
        expected = [self.cached[stage] for stage in self.stage_of_layer]
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
        repeats = batch // rows
        self.next_position = self.next_position.repeat_interleave(repeats, dim=0)
        self.tail = self.tail.repeat_interleave(repeats, dim=0)
        self.valid = [None if mask is None else mask.repeat_interleave(repeats, dim=0) for mask in self.valid]

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
            old = [ones(batch, n) if m is None else m for m, n in zip(self.valid, self.cached, strict=True)]
            self.valid = [torch.cat((mask, new), dim=1) for mask in old]
        position_ids = (self.next_position[:, None] - 1 + new.cumsum(dim=1)).clamp(min=0)
        self.cached = [length + count for length in self.cached]
        self.seen += count
        self.tail = self.tail + count
        self.next_position = position_ids[:, -1] + 1
        return position_ids


def last_position(position_ids: Tensor, batch: int, valid: Tensor | None) -> Tensor:
    """(B,) largest position of the last token that is no padding.

    Args:
        position_ids: (B or 1, S) or (3 or 4, B or 1, S).
        valid: (B, S) bool or None, False at padding.
    """
    if position_ids.dim() == 3:
        position_ids = position_ids[-3:].amax(dim=0)  # with four rows, the first counts text tokens for masks
    if valid is None:
        return position_ids[:, -1].expand(batch)
    last = (torch.arange(valid.shape[1], device=valid.device) * valid).amax(dim=1, keepdim=True)
    return position_ids.expand(batch, -1).gather(1, last).squeeze(1)


def check_cache(cache: Cache) -> None:
    """Raise UnsupportedInputError unless every layer of the cache may have its own length."""
    plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain or cache.is_compileable or getattr(cache, "offloading", False):
        raise UnsupportedInputError(
            f"{type(cache).__name__} can't hold layers of different lengths; use the default DynamicCache "
            "(no cache_implementation such as 'static', 'quantized' or 'offloaded')"
        )
