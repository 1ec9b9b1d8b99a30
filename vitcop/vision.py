"""Visual tokens between the vision tower and the language model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan
from vitcop.errors import UnsupportedInputError
from vitcop.families import Family, Inputs
from vitcop.methods.base import Method
from vitcop.selection import apply_selection, kept_mass
from vitcop.tokens import Needs, VisualTokens

Clock = Callable[[str], None]


class VisionCache:
    """The last clip's tokens as the vision tower made them, shared by `prune` contexts of one model.

    Holds all frames of the clip, so it trades the flat vision memory of a single run for not running the tower again.
    What a later method needs beyond what is there (attention, keys) is encoded anew, and then kept with it.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] = (None,)
        self._chunks: list[VisualTokens] = []

    def chunks(
        self, key: tuple[object, ...], needs: Needs, encode: Callable[[], Iterable[VisualTokens]]
    ) -> list[VisualTokens]:
        """The clip's tokens; `encode` makes them when they are not there.

        Args:
            key: the pixel tensor, compared by identity, its version, and what else the tokens depend on.
        """
        # The pixels are compared by identity: comparing their values would cost more than it saves.
        if not (self._key[0] is key[0] and self._key[1:] == key[1:] and self._has(needs)):
            self._chunks = []  # lets go of the last clip before the next one is encoded
            self._key, self._chunks = key, list(encode())
        return self._chunks

    def _has(self, needs: Needs) -> bool:
        attention = self._chunks[0].attention is not None or not needs.attention
        return attention and (self._chunks[0].keys is not None or not needs.keys)


@dataclass(frozen=True)
class Encoded:
    """Visual tokens that enter the language model, of B clips.

    Attributes:
        features: (B, K, D).
        index: (B, K) number of each token within its clip, ascending.
        labels: (B, K) or None.
        mass: (B, K) tokens that each one stands for; None for methods without a bias.
        deepstack: side features (B, K, D), one for each of the model's first layers.
        fixed: (B, X, D) or None, for the placeholders that are no visual tokens.
    """

    features: Tensor
    index: Tensor
    labels: Tensor | None
    mass: Tensor | None
    deepstack: tuple[Tensor, ...]
    fixed: Tensor | None


class VisionStage:
    """Runs the vision tower and the stage before the language model.

    Args:
        cache: shared with other methods on the same pixels, or None.
        clock: called with "vision" and "selection" when such a piece of work ends.
    """

    def __init__(
        self, family: Family, method: Method, frame_chunk: int, cache: VisionCache | None, clock: Clock
    ) -> None:
        self.family, self.method, self.frame_chunk, self.cache, self.clock = family, method, frame_chunk, cache, clock
        self._last: tuple[tuple[object, ...], Encoded] | None = None

    def forget(self) -> None:
        """Let go of the last clip."""
        self._last = None

    def encode(self, inputs: Inputs, pixels: Tensor, plan: Plan, geometry: Geometry) -> Encoded:
        """The clip's tokens after this stage; the last clip's are kept for further questions on it."""
        # The tensor's version tells a clip written into the same memory from the one before.
        key = (pixels, _version(pixels), geometry)
        if self._last is not None and self._last[0][0] is pixels and self._last[0][1:] == key[1:]:
            self.clock("vision")
        else:
            self.forget()  # before the next clip is encoded
            self._last = (key, self._run(inputs, pixels, plan, geometry))
        self.clock("selection")
        return self._last[1]

    def _run(self, inputs: Inputs, pixels: Tensor, plan: Plan, geometry: Geometry) -> Encoded:
        # Frames, rows and columns as the tower is to see them; smaller than the model's own only for `downscale`.
        encoded = plan.encoded(geometry)
        if encoded != geometry and not self.family.scales_frames:
            raise UnsupportedInputError(
                f"{self.family.label} can't encode smaller frames; {self.method.name} needs that"
            )
        encode = functools.partial(self.family.encode, inputs, encoded, self.method.needs, self.frame_chunk)
        chunks: Iterable[VisualTokens]
        if self.cache is None:
            chunks = encode()
        else:
            key = (pixels, _version(pixels), encoded, self.frame_chunk)
            chunks = self.cache.chunks(key, self.method.needs, encode)
        # Only a method that looks at single frames can prune chunk by chunk, which bounds memory by a chunk's tokens.
        if self.method.frame_local:
            return concatenate([self._select(chunk, plan, geometry) for chunk in self._timed(chunks)])
        whole = join_frames(list(chunks))
        self.clock("vision")
        return self._select(whole, plan, geometry)

    def _select(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Encoded:
        selection = self.method.select_frames(tokens, plan, geometry)
        # (B, F * N, D). Side features are kept and merged alike; a selection's finished `features` are the tokens'
        # alone, so `plain` leaves them out.
        plain, features = replace(selection, features=None), tokens.features.flatten(1, 2)
        # Before the model every token stands for itself alone: mass 1.
        one = torch.ones(features.shape[:2], device=features.device)
        return Encoded(
            features=apply_selection(selection, features),
            # Numbers count over the whole clip, not over this chunk.
            index=selection.keep + tokens.first_frame * geometry.tokens_per_frame,
            labels=selection.labels,
            mass=kept_mass(selection, one) if self.method.bias else None,
            deepstack=tuple(apply_selection(plain, side.flatten(1, 2)) for side in tokens.deepstack),
            fixed=tokens.fixed,
        )

    def _timed(self, chunks: Iterable[VisualTokens]) -> Iterator[VisualTokens]:
        # The chunks are made lazily: what passes until one comes is the tower's time, the rest selection.
        for chunk in chunks:
            self.clock("vision")
            yield chunk
            self.clock("selection")


def _version(pixels: Tensor) -> int | None:
    """Changes when the pixels are written to; None for tensors made in inference mode, which don't count that."""
    return None if pixels.is_inference() else pixels._version


def join_frames(chunks: list[VisualTokens]) -> VisualTokens:
    """One VisualTokens of all frames from those of consecutive chunks."""
    if len(chunks) == 1:
        return chunks[0]
    first = chunks[0]
    return replace(
        first,
        features=torch.cat([chunk.features for chunk in chunks], dim=1),
        attention=_join([chunk.attention for chunk in chunks]),
        keys=_join([chunk.keys for chunk in chunks]),
        deepstack=tuple(torch.cat(sides, dim=1) for sides in zip(*(c.deepstack for c in chunks), strict=True)),
        fixed=_join([chunk.fixed for chunk in chunks]),
    )


def concatenate(parts: list[Encoded]) -> Encoded:
    return Encoded(
        features=torch.cat([part.features for part in parts], dim=1),
        index=torch.cat([part.index for part in parts], dim=1),
        labels=_join([part.labels for part in parts]),
        mass=_join([part.mass for part in parts]),
        deepstack=tuple(torch.cat(sides, dim=1) for sides in zip(*(p.deepstack for p in parts), strict=True)),
        fixed=_join([part.fixed for part in parts]),
    )


def _join(parts: list[Tensor | None]) -> Tensor | None:
    """Concatenate along the token axis what the chunks have of one kind; None if none has any."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim=1) if there else None


def repeat_rows(encoded: Encoded, batch: int) -> Encoded:
    """Rows for `batch` prompts from those of fewer clips: beams and returned sequences share a clip's tokens."""
    clips = len(encoded.features)
    if batch == clips:
        return encoded
    if batch % clips:
        raise UnsupportedInputError(f"{clips} videos for {batch} prompts; each prompt needs one video")
    # Row i becomes rows i * n ... i * n + n - 1, the order in which `generate` repeats its prompts.
    repeat = functools.partial(torch.repeat_interleave, repeats=batch // clips, dim=0)
    return Encoded(
        features=repeat(encoded.features),
        index=repeat(encoded.index),
        labels=None if encoded.labels is None else repeat(encoded.labels),
        mass=None if encoded.mass is None else repeat(encoded.mass),
        deepstack=tuple(map(repeat, encoded.deepstack)),
        fixed=None if encoded.fixed is None else repeat(encoded.fixed),
    )
