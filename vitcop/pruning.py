"""`prune`: puts a method onto one model by forward hooks, for as long as the context lasts."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from vitcop.budget import Geometry, Plan
from vitcop.cost import decoder_macs
from vitcop.families import Family, UnsupportedInputError, family_of
from vitcop.layout import ATTRIBUTE, CacheLayout, check_cache, last_position
from vitcop.methods.base import Method
from vitcop.selection import Selection, apply_selection, take, true_indices
from vitcop.stats import PrefillRecord, PruneStats
from vitcop.tokens import LayerTokens, VisualTokens

Clock = Callable[[str], None]
Positions = Literal["original", "compact"]


class Deferred(dict[str, Any]):
    """What travels through `generate` as `mm_encoder_outputs` up to the first forward: the pixels, which it would
    otherwise encode before the model is called ("visual"), and the length of the whole conversation ("length").
    """

    def items(self) -> Any:
        """Asked for only where `generate` cuts the prompt and its features into chunks.

        Raises:
            UnsupportedInputError: always.
        """
        raise UnsupportedInputError("a prompt can't be pruned in chunks; leave out prefill_chunk_size")

    def __deepcopy__(self, memo: dict[int, Any]) -> Deferred:
        return Deferred(self)  # for an assistant model; it needs no pixels of its own


_pruned_models: set[int] = set()


class VisionCache:
    """The last clip's tokens as the vision tower made them, shared by `prune` contexts of one model.

    Holds all frames of the clip, so it trades the flat vision memory of a single run for not running the tower again.
    What a later method needs beyond what is there (attention, keys) is encoded anew, and then kept with it.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = (None,)
        self._chunks: list[VisualTokens] = []

    def chunks(
        self, key: tuple[Any, ...], method: Method, encode: Callable[[], Iterable[VisualTokens]]
    ) -> list[VisualTokens]:
        """The clip's tokens; `encode` makes them when they are not there.

        Args:
            key: the pixel tensor, compared by identity, and what else the tokens depend on.
        """
        if not (self._key[0] is key[0] and self._key[1:] == key[1:] and self._has(method)):
            self._chunks = []  # lets go of the last clip before the next one is encoded
            self._key, self._chunks = key, list(encode())
        return self._chunks

    def _has(self, method: Method) -> bool:
        attention = self._chunks[0].attention is not None or not method.needs_vision_attention
        return attention and (self._chunks[0].keys is not None or not method.needs_vision_keys)


@dataclass(frozen=True)
class Encoded:
    """Visual tokens that enter the language model, of B clips.

    Attributes:
        features: (B, K, D).
        index: (B, K) number of each token within its clip, ascending.
        labels: (B, K) or None.
        deepstack: side features (B, K, D), one for each of the model's first layers.
        fixed: (B, X, D) or None, for the placeholders that are no visual tokens.
    """

    features: Tensor
    index: Tensor
    labels: Tensor | None
    deepstack: tuple[Tensor, ...]
    fixed: Tensor | None


@dataclass
class Sequence:
    """The prompt on its way through the layers: what of it is left, and where the visual tokens are.

    Attributes:
        visual: (B, K) positions of visual tokens in the sequence, ascending.
        index: (B, K) their numbers within the clip.
        labels: (B, K) or None.
        valid: (B, S) bool or None, False at padding.
        after: (B,) tokens after the video, which stay.
        rotary: of the tokens left; None until a layer has been pruned.
        mask: attention mask of the current stage; made when first needed.
    """

    visual: Tensor
    index: Tensor
    labels: Tensor | None
    valid: Tensor | None
    after: Tensor
    deepstack: tuple[Tensor, ...]
    length: int
    rotary: tuple[Tensor, Tensor] | None = None
    mask: Any = None

    def keep(self, selection: Selection) -> Tensor:
        """Shrink to the selection; return the (B, S') positions of the sequence that stay."""
        batch, count = self.visual.shape
        alive = torch.ones(batch, self.length, dtype=torch.bool, device=self.visual.device)
        alive.scatter_(1, self.visual, False).scatter_(1, take(self.visual, selection.keep), True)
        self.length += selection.keep.shape[1] - count
        positions = true_indices(alive, self.length)
        place = alive.long().cumsum(1) - 1
        self.visual = place.gather(1, take(self.visual, selection.keep))
        self.index = take(self.index, selection.keep)
        if self.labels is not None:
            self.labels = take(self.labels, selection.keep)
        self.valid = None if self.valid is None else take(self.valid, positions)
        self.deepstack = tuple(take(side, selection.keep) for side in self.deepstack)
        return positions


@dataclass
class Prefill:
    """State of one prefill: made when it begins, dropped when it ends.

    Attributes:
        seen: tokens of the unpruned prompt.
        keeps_cache: whether the caller gets the cache (`use_cache`); pruning needs one either way.
        sequence: None at retention 1, where nothing is changed.
        kept_index: see PrefillRecord.
        layout: of the cache being filled.
        previous_hidden, embeds, embeds_visual: see LayerTokens.
    """

    plan: Plan
    geometry: Geometry
    batch: int
    seen: int
    keeps_cache: bool
    cache: Cache | None = None
    sequence: Sequence | None = None
    layout: CacheLayout | None = None
    kept_index: dict[str, Tensor] = field(default_factory=dict)
    previous_hidden: Tensor | None = None
    embeds: Tensor | None = None
    embeds_visual: Tensor | None = None


@dataclass
class Continuation:
    """State of a forward that goes on from a pruned cache: the masks of its stages."""

    cache: Cache
    layout: CacheLayout
    masks: dict[int, Any]


class prune:
    """Prune a model's visual tokens while the context lasts.

    Forward hooks on this one instance do it; they are removed at the end, also after an exception. The model outside
    the context, and inside it at a retention ratio of 1, computes exactly what it computes without. A cache made
    inside remembers its layout, so that decoding, a later turn, and copies of the cache go on correctly inside the
    context.

    Args:
        model: an unmodified Hugging Face video language model (`...ForConditionalGeneration`).
        method: what to prune; see `vitcop.methods`.
        frame_chunk: frames that go through the vision tower at a time.
        vision: keeps what the vision tower made of the last clip, for other methods on the same pixels.
        token_chunk: tokens that go through a language model MLP at a time.
        positions: "original" keeps every token's place in the unpruned sequence; "compact" numbers the tokens that
            enter the language model from 0, for clips whose unpruned length is beyond the trained context. Needs
            one-dimensional positions (no M-RoPE).
        clock: called with "vision", "selection", "prefill" and "step" when such a phase ends; a prefill that is
            pruned at layers comes in several pieces, with "selection" between them.

    Raises:
        UnsupportedModelError: no adapter for this model.
        UnsupportedInputError: (inside) inputs, caches or ways to generate that can't be pruned.
        UnreachableBudgetError: (inside) the method can't meet its retention ratio on this clip.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        frame_chunk: int = 16,
        vision: VisionCache | None = None,
        token_chunk: int = 4096,
        positions: Positions = "original",
        clock: Clock | None = None,
    ) -> None:
        if frame_chunk < 1 or token_chunk < 1:
            raise ValueError(f"frame_chunk and token_chunk must be at least 1, got {frame_chunk} and {token_chunk}")
        if positions not in ("original", "compact"):
            raise ValueError(f"positions must be 'original' or 'compact', got {positions!r}")
        self.model: Any = model
        self.family: Family = family_of(model)
        self.method = method.bind(model)
        self.frame_chunk, self.token_chunk, self.positions = frame_chunk, token_chunk, positions
        self.vision = vision
        self.clock: Clock = clock or (lambda label: None)
        self.stats = PruneStats()
        self._signature = inspect.signature(self.family.base.forward)
        self._active: Prefill | Continuation | None = None
        self._memo: tuple[tuple[Any, ...], Encoded] | None = None
        self._visual: dict[str, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> PruneStats:
        if id(self.model) in _pruned_models:
            raise RuntimeError("this model is already being pruned; leave the other context first")
        _pruned_models.add(id(self.model))
        base, text, layers = self.family.base, self.family.text, self.family.layers
        self._handles = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, always_call=True),
            text.register_forward_pre_hook(self._before_text, with_kwargs=True),
        ]
        for number, layer in enumerate(layers):
            hook = functools.partial(self._before_layer, number)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if self.method.retention_ratio < 1:
                layer.mlp = TokenChunks(layer.mlp, self.token_chunk)
        # `generate` encodes pixels by this method of the model before any forward that a hook could see.
        encode = self.model._prepare_multimodal_encoder_kwargs_for_generation
        self.model._prepare_multimodal_encoder_kwargs_for_generation = functools.partial(self._before_encoding, encode)
        return self.stats

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self.family.layers:
            if isinstance(layer.mlp, TokenChunks):
                layer.mlp = layer.mlp.mlp
        del self.model._prepare_multimodal_encoder_kwargs_for_generation  # the class's own shows again
        self._handles, self._active, self._memo, self._visual = [], None, None, {}
        _pruned_models.discard(id(self.model))

    # -- the whole model --------------------------------------------------------------------------------------------

    def _before_encoding(self, encode: Callable[..., Any], model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Send the pixels of `generate` on to the forward, where they can be pruned."""
        names = [name for name in self.family.visual_inputs if model_kwargs.get(name) is not None]
        visual = {name: model_kwargs[name] for name in names}
        pruned = hasattr(model_kwargs.get("past_key_values"), ATTRIBUTE)
        if self.method.retention_ratio == 1 and not pruned:
            self._visual = visual
            return encode(model_kwargs)
        for name in names:
            del model_kwargs[name]
        model_kwargs["mm_encoder_outputs"] = Deferred(visual=visual, length=model_kwargs["position_ids"].shape[-1])
        return model_kwargs

    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        inputs = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        inputs |= inputs.pop("kwargs", {})
        cache = inputs.get("past_key_values")
        layout: CacheLayout | None = getattr(cache, ATTRIBUTE, None)
        if layout is not None:
            return (), self._continue(inputs, layout)
        visual = inputs | self._visual_inputs(inputs)
        if self.family.pixels(visual) is None:
            return None
        if cache is not None and cache.get_seq_length():
            raise UnsupportedInputError("visual inputs after a cached prefix can't be pruned; start from the video")
        return self._prefill(visual)

    def _visual_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The visual inputs of a forward that `generate` holds back or has encoded."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        if isinstance(encoded, Deferred):
            return encoded["visual"]
        if encoded and self.method.retention_ratio < 1:
            raise UnsupportedInputError("encoded features (mm_encoder_outputs) can't be pruned; pass the pixels")
        return self._visual if encoded else {}

    def _after_base(self, module: nn.Module, args: Any, output: Any) -> None:
        active, self._active = self._active, None
        if output is None:  # the forward raised
            return
        if isinstance(active, Prefill):
            self._finish(active, output.past_key_values)
            if not active.keeps_cache:
                output.past_key_values = None
            self.clock("prefill")
        else:
            self.clock("step")

    def _prefill(self, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        pixels, ids, mask = self.family.pixels(inputs), inputs.get("input_ids"), inputs.get("attention_mask")
        if pixels is None or ids is None or inputs.get("inputs_embeds") is not None:
            raise UnsupportedInputError("pass input_ids together with the pixels; inputs_embeds can't be pruned")
        geometry = self.family.geometry(inputs)
        plan = self.method.plan(geometry)
        state = self._active = Prefill(
            plan=plan,
            geometry=geometry,
            batch=len(ids),
            seen=ids.shape[1],
            keeps_cache=inputs.get("use_cache") is not False,
        )
        if self.method.retention_ratio == 1:
            return None
        state.cache = inputs.get("past_key_values")
        if state.cache is None:
            state.cache = DynamicCache(config=self.family.text_config)
        check_cache(state.cache)
        _check_mask(mask)
        encoded = self._encode(inputs, pixels, state)
        return (), self._enter(inputs, _repeat(encoded, len(ids)), state)

    def _encode(self, inputs: dict[str, Any], pixels: Tensor, state: Prefill) -> Encoded:
        """The clip's tokens after the stage before the model; the last clip's are kept for further questions on it."""
        version = None if pixels.is_inference() else pixels._version
        key = (pixels, version, self.method, state.geometry)
        if self._memo is not None and self._memo[0][0] is pixels and self._memo[0][1:] == key[1:]:
            encoded = self._memo[1]
            self.clock("vision")
        else:
            self._memo = None  # lets go of the last clip before the next one is encoded
            encoded = self._run_vision(inputs, state)
            self._memo = (key, encoded)
        self.clock("selection")
        return encoded

    def _run_vision(self, inputs: dict[str, Any], state: Prefill) -> Encoded:
        geometry = state.plan.encoded(state.geometry)
        if geometry != state.geometry and not self.family.scales_frames:
            raise UnsupportedInputError(
                f"{self.family.label} can't encode smaller frames; {self.method.name} needs that"
            )
        encode = functools.partial(self.family.encode, inputs, geometry, self.method, self.frame_chunk)
        key = (self.family.pixels(inputs), geometry, self.frame_chunk)
        chunks = encode() if self.vision is None else self.vision.chunks(key, self.method, encode)
        if self.method.frame_local:
            return _concatenate([self._select(chunk, state) for chunk in _timed(chunks, self.clock)])
        whole = join_frames(list(chunks))
        self.clock("vision")
        return self._select(whole, state)

    def _select(self, tokens: VisualTokens, state: Prefill) -> Encoded:
        selection = self.method.select_frames(tokens, state.plan, state.geometry)
        flat = tokens.features.flatten(1, 2)
        plain = replace(selection, features=None)
        return Encoded(
            features=apply_selection(selection, flat),
            index=selection.keep + tokens.first_frame * state.geometry.tokens_per_frame,
            labels=selection.labels,
            deepstack=tuple(apply_selection(plain, side.flatten(1, 2)) for side in tokens.deepstack),
            fixed=tokens.fixed,
        )

    def _enter(self, inputs: dict[str, Any], encoded: Encoded, state: Prefill) -> dict[str, Any]:
        """Replace ids and pixels by the embeddings of the tokens that stay, with their original positions."""
        family, ids, geometry = self.family, inputs["input_ids"], state.geometry
        batch, length = ids.shape
        offsets = family.token_offsets(geometry).to(ids.device)
        count = len(offsets) + (0 if encoded.fixed is None else encoded.fixed.shape[1])
        place = self._places(ids, count)
        others = torch.ones(count, dtype=torch.bool, device=ids.device).index_fill_(0, offsets, False)
        fixed_place = place[:, true_indices(others[None], count - len(offsets))[0]]
        tokens = place[:, offsets]
        sequence = Sequence(
            visual=tokens,
            index=torch.arange(len(offsets), device=ids.device).expand(batch, -1),
            labels=None,
            valid=None if (mask := inputs.get("attention_mask")) is None else mask.bool(),
            after=length - 1 - place[:, -1],
            deepstack=(),
            length=length,
        )
        positions = sequence.keep(Selection(keep=encoded.index))
        sequence.labels, sequence.deepstack = encoded.labels, encoded.deepstack
        state.kept_index[state.plan.name(-1)] = sequence.index

        embeds = self.model.get_input_embeddings()(take(ids, positions))
        embeds = _put(embeds, sequence.visual, encoded.features)
        if encoded.fixed is not None:
            embeds = _put(embeds, torch.searchsorted(positions, fixed_place.contiguous()), encoded.fixed)
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            position_ids = family.position_ids(inputs)
        end = last_position(position_ids, batch)  # also where the prompt ends with a visual token that is pruned
        position_ids = _slice_positions(position_ids, positions)
        if self.positions == "compact":
            position_ids = _compact(position_ids, sequence.valid)
            end = last_position(position_ids, batch)
        elif position_ids.dim() == 2:
            self._warn_beyond_context(length)
        state.sequence = sequence
        state.layout = CacheLayout(
            seen=state.seen,
            next_position=end + 1,
            tail=sequence.after * (not self.method.query_aware),
        )
        return self._text_inputs(inputs) | {
            "inputs_embeds": embeds,
            "attention_mask": sequence.valid,
            "position_ids": position_ids,
            "past_key_values": state.cache,
            "use_cache": True,
        }

    def _warn_beyond_context(self, length: int) -> None:
        limit = self.family.text_config.max_position_embeddings
        if length > limit:
            warnings.warn(
                f"the unpruned prompt has {length} tokens, the model was trained on positions up to {limit}; "
                "positions are kept as they are (prune(..., positions='compact') numbers the kept tokens anew)",
                stacklevel=2,
            )

    def _places(self, ids: Tensor, count: int) -> Tensor:
        """(B, count) positions of the visual placeholders, of which each row must have `count`."""
        mask = self.family.placeholders(ids)
        _require(
            (mask.sum(dim=1) == count).all(),
            f"every prompt of the batch must hold {count} visual placeholder tokens, one video of equal length each; "
            "put other lengths into other batches",
        )
        return true_indices(mask, count)

    def _text_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The forward inputs that are neither ids nor anything visual."""
        dropped = ("input_ids", "pixel_values", "image_", "video_", "mm_", "second_per_grid", "image_sizes")
        return {name: value for name, value in inputs.items() if not name.startswith(dropped)}

    def _continue(self, inputs: dict[str, Any], layout: CacheLayout) -> dict[str, Any]:
        """Give a forward from a pruned cache its true new tokens, positions and masks."""
        cache = inputs["past_key_values"]
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        tokens, mask = inputs[name], inputs.get("attention_mask")
        _check_mask(mask)
        layout.match_length(cache)
        layout.match_batch(len(tokens))
        length = (inputs.get("mm_encoder_outputs") or {}).get("length") if mask is None else mask.shape[1]
        count = layout.new_tokens(tokens.shape[1], length)
        if name == "input_ids" and self.family.pixels(inputs | self._visual_inputs(inputs)) is not None:
            new_clips = self.family.placeholders(tokens[:, -count:]).any()
            _require(~new_clips, "a video after a cached prompt can't be pruned; start a conversation with its videos")
        position_ids = layout.append(len(tokens), count, None if mask is None else mask[:, -count:].bool())
        self._active = Continuation(cache, layout, {})
        return self._text_inputs(inputs) | {
            name: tokens[:, -count:],
            "position_ids": position_ids,
            "attention_mask": layout.valid[0],
        }

    # -- the language model -----------------------------------------------------------------------------------------

    def _before_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(self._active, Prefill) and self._active.sequence is None:  # retention 1: only the time is taken
            self.clock("vision")
            self.clock("selection")

    def _before_layer(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        active = self._active
        if isinstance(active, Continuation):
            return self._continue_layer(active, layer, args, kwargs)
        if active is None or active.sequence is None:
            return None
        return self._prefill_layer(active, active.sequence, layer, args, kwargs)

    def _prefill_layer(
        self, state: Prefill, sequence: Sequence, layer: int, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == 0 and self.method.needs_embeds:
            state.embeds, state.embeds_visual = hidden, sequence.visual
        if 0 < layer <= len(sequence.deepstack):
            hidden = _add(hidden, sequence.visual, sequence.deepstack[layer - 1])
        if state.plan.layers.get(layer, sequence.visual.shape[1]) < sequence.visual.shape[1]:
            self.clock("prefill")
            hidden = self._prune_layer(state, sequence, layer, hidden, kwargs)
            self.clock("selection")
        assert state.layout is not None
        state.layout.enter_layer(sequence.length, sequence.valid)
        needed = self.method.needs_previous_hidden and layer + 1 in state.plan.layers
        state.previous_hidden = hidden if needed else None
        # Layers rotate by `position_embeddings`; in position ids with gaps, flash attention would see packed prompts.
        changed: dict[str, Any] = {"position_ids": None}
        if sequence.rotary is not None:
            if sequence.mask is None:
                sequence.mask = (self._mask(hidden, sequence.valid, state.cache, layer),)
            changed |= {"attention_mask": sequence.mask[0], "position_embeddings": sequence.rotary}
        return self._with_hidden(hidden, args, kwargs | changed)

    def _prune_layer(
        self, state: Prefill, sequence: Sequence, layer: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        batch = len(hidden)
        rotary = sequence.rotary or tuple(part.expand(batch, -1, -1) for part in kwargs["position_embeddings"])
        assert state.cache is not None and state.layout is not None
        previous = state.cache.layers[layer - 1]
        tokens = LayerTokens(
            family=self.family,
            layer=layer,
            hidden=hidden,
            visual=sequence.visual,
            index=sequence.index,
            labels=sequence.labels,
            previous_keys=previous.keys,
            previous_values=previous.values,
            previous_hidden=state.previous_hidden,
            embeds=state.embeds,
            embeds_visual=state.embeds_visual,
            valid=sequence.valid,
            rotary=rotary,
            after=sequence.after,
            next_position=state.layout.next_position,
        )
        selection = self.method.select_layer(tokens, state.plan, state.geometry)
        merged = None if selection.merge_into is None else apply_selection(selection, tokens.features)
        positions = sequence.keep(selection)
        state.kept_index[state.plan.name(layer)] = sequence.index
        sequence.rotary = (take(rotary[0], positions), take(rotary[1], positions))
        sequence.mask = None
        hidden = take(hidden, positions)
        return hidden if merged is None else _put(hidden, sequence.visual, merged)

    def _continue_layer(
        self, state: Continuation, layer: int, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        stage = state.layout.stage_of_layer[layer]
        if stage == 0:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if stage not in state.masks:
            state.masks[stage] = self._mask(hidden, state.layout.valid[stage], state.cache, layer)
        return args, kwargs | {"attention_mask": state.masks[stage]}

    def _mask(self, hidden: Tensor, valid: Tensor | None, cache: Cache | None, layer: int) -> Any:
        """The mask that the model's attention implementation takes, for the tokens that this layer's cache holds."""
        return create_causal_mask(
            config=self.family.text_config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=cache,
            layer_idx=layer,
        )

    @staticmethod
    def _with_hidden(hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

    # -- afterwards -------------------------------------------------------------------------------------------------

    def _finish(self, state: Prefill, cache: Cache | None) -> None:
        family, plan, geometry = self.family, state.plan, state.geometry
        kept = plan.per_layer(family.num_layers)
        lengths = (state.seen,) * family.num_layers
        if state.layout is not None:
            setattr(cache, ATTRIBUTE, state.layout)
            lengths = tuple(state.layout.cached[stage] for stage in state.layout.stage_of_layer)
        stored = 0 if cache is None else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        self.stats.records.append(
            PrefillRecord(
                method=self.method.describe(),
                batch=state.batch,
                grid=(geometry.frames, geometry.height, geometry.width),
                kept_per_layer=kept,
                stages=plan.stages(),
                prompt_tokens=lengths[0] - kept[0],
                kv_bytes=stored // state.batch,
                macs_vision=family.vision_macs(plan.encoded(geometry)),
                macs_language=decoder_macs(family.text_config, lengths),
                kept_index=state.kept_index,
            )
        )


class TokenChunks(nn.Module):
    """Runs an MLP on a few tokens at a time, so that its wide intermediate activations never exist for all of them."""

    def __init__(self, mlp: nn.Module, tokens: int) -> None:
        super().__init__()
        self.mlp, self.tokens = mlp, tokens

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= self.tokens:
            return self.mlp(hidden)
        output = torch.empty_like(hidden)
        for start in range(0, hidden.shape[1], self.tokens):
            part = slice(start, start + self.tokens)
            output[:, part] = self.mlp(hidden[:, part])
        return output


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


def _concatenate(parts: list[Encoded]) -> Encoded:
    return Encoded(
        features=torch.cat([part.features for part in parts], dim=1),
        index=torch.cat([part.index for part in parts], dim=1),
        labels=_join([part.labels for part in parts]),
        deepstack=tuple(torch.cat(sides, dim=1) for sides in zip(*(p.deepstack for p in parts), strict=True)),
        fixed=_join([part.fixed for part in parts]),
    )


def _join(parts: list[Tensor | None]) -> Tensor | None:
    """Concatenate along the token axis what the chunks have of one kind; None if none has any."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim=1) if there else None


def _timed(chunks: Any, clock: Clock) -> Any:
    for chunk in chunks:
        clock("vision")
        yield chunk
        clock("selection")


def _put(tokens: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Copy of `tokens` (B, S, D) with `values` (B, K, D) at the positions `where` (B, K)."""
    index = where[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.scatter(1, index, values.to(tokens.dtype).expand(*where.shape, -1))


def _add(tokens: Tensor, where: Tensor, values: Tensor) -> Tensor:
    return _put(tokens, where, take(tokens, where) + values.to(tokens.dtype))


def _slice_positions(position_ids: Tensor, positions: Tensor) -> Tensor:
    """Position ids (..., B or 1, S) of the tokens at `positions` (B, S') -> (..., B, S')."""
    batch, length = positions.shape
    full = position_ids.expand(*position_ids.shape[:-2], batch, position_ids.shape[-1])
    return full.gather(-1, positions.expand(*full.shape[:-2], batch, length))


def _check_mask(mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedInputError(f"attention_mask must be a tensor (batch, tokens), got {got}")


def _compact(position_ids: Tensor, valid: Tensor | None) -> Tensor:
    """Positions (B, S) of the same tokens, numbered from 0; padding counts for nothing."""
    if position_ids.dim() != 2:
        raise UnsupportedInputError("positions='compact' needs one-dimensional positions; this model uses M-RoPE")
    if valid is None:
        return torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


def _require(condition: Tensor, message: str) -> None:
    """Raise where a condition fails; on a GPU it shows at the next synchronisation, nothing waits for it here.

    Raises:
        UnsupportedInputError: on the CPU.
    """
    if condition.device.type == "cpu" and not condition:
        raise UnsupportedInputError(message)
    torch._assert_async(condition, message)


def _repeat(encoded: Encoded, batch: int) -> Encoded:
    """Rows for `batch` prompts from those of fewer clips: beams and returned sequences share a clip's tokens."""
    clips = len(encoded.features)
    if batch == clips:
        return encoded
    if batch % clips:
        raise UnsupportedInputError(f"{clips} videos for {batch} prompts; each prompt needs one video")
    repeat = functools.partial(torch.repeat_interleave, repeats=batch // clips, dim=0)
    return Encoded(
        features=repeat(encoded.features),
        index=repeat(encoded.index),
        labels=None if encoded.labels is None else repeat(encoded.labels),
        deepstack=tuple(map(repeat, encoded.deepstack)),
        fixed=None if encoded.fixed is None else repeat(encoded.fixed),
    )
