"""`prune`: puts a method onto one model by forward hooks, for as long as the context lasts."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from vitcop.cost import decoder_macs
from vitcop.errors import UnsupportedInputError
from vitcop.families import Family, family_of
from vitcop.layout import ATTRIBUTE, CacheLayout, check_cache, last_position
from vitcop.methods.base import Method
from vitcop.selection import Selection, apply_selection, take, true_indices
from vitcop.state import Continuation, Prefill, Sequence, add, compact_positions, put, slice_positions
from vitcop.stats import PrefillRecord, PruneStats
from vitcop.tokens import LayerTokens
from vitcop.vision import Clock, Encoded, VisionCache, VisionStage, repeat_rows

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


ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"

_pruned_models: set[int] = set()


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
        self.token_chunk, self.positions = token_chunk, positions
        self.clock: Clock = clock or (lambda label: None)
        self._vision = VisionStage(self.family, self.method, frame_chunk, vision, self.clock)
        self.stats = PruneStats()
        self._signature = inspect.signature(self.family.base.forward)
        self._active: Prefill | Continuation | None = None
        self._visual: dict[str, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> PruneStats:
        if id(self.model) in _pruned_models:
            raise RuntimeError("this model is already being pruned; leave the other context first")
        _pruned_models.add(id(self.model))
        base, text, layers = self.family.base, self.family.text, self.family.language.layers
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
        # Newer versions of `generate` encode pixels by this method, before any forward that a hook could see.
        if (encode := getattr(self.model, ENCODE, None)) is not None:
            setattr(self.model, ENCODE, functools.partial(self._before_encoding, encode))
        return self.stats

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self.family.language.layers:
            if isinstance(layer.mlp, TokenChunks):
                layer.mlp = layer.mlp.mlp
        vars(self.model).pop(ENCODE, None)  # the class's own shows again
        self._handles, self._active, self._visual = [], None, {}
        self._vision.forget()
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
            state.cache = DynamicCache(config=self.family.language.config)
        check_cache(state.cache)
        _check_mask(mask)
        encoded = self._vision.encode(inputs, pixels, plan, geometry)
        return (), self._enter(inputs, repeat_rows(encoded, len(ids)), state)

    def _enter(self, inputs: dict[str, Any], encoded: Encoded, state: Prefill) -> dict[str, Any]:
        """Replace ids and pixels by the embeddings of the tokens that stay, with their original positions."""
        family, ids, geometry = self.family, inputs["input_ids"], state.geometry
        batch, length = ids.shape
        with torch.device(ids.device):  # made there: copying would wait for all that the device has to do
            offsets = family.token_offsets(geometry)
        count = len(offsets) + (0 if encoded.fixed is None else encoded.fixed.shape[1])
        place = self._places(ids, count)
        others = torch.ones(count, dtype=torch.bool, device=ids.device).index_fill_(0, offsets, False)
        fixed_place = place[:, true_indices(others[None], count - len(offsets))[0]]
        tokens = place[:, offsets]
        valid = None if (mask := inputs.get("attention_mask")) is None else mask.bool()
        sequence = Sequence(
            visual=tokens,
            index=torch.arange(len(offsets), device=ids.device).expand(batch, -1),
            labels=None,
            valid=valid,
            after=length - 1 - place[:, -1],
            deepstack=(),
            length=length,
        )
        positions = sequence.keep(Selection(keep=encoded.index))
        sequence.labels, sequence.deepstack = encoded.labels, encoded.deepstack
        state.kept_index[state.plan.name(-1)] = sequence.index

        embeds = self.model.get_input_embeddings()(take(ids, positions))
        embeds = put(embeds, sequence.visual, encoded.features)
        if encoded.fixed is not None:
            embeds = put(embeds, torch.searchsorted(positions.contiguous(), fixed_place.contiguous()), encoded.fixed)
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            position_ids = family.position_ids(inputs)
        end = last_position(position_ids, batch, valid)  # also where the prompt ends with a visual token that is pruned
        position_ids = slice_positions(position_ids, positions)
        if self.positions == "compact":
            position_ids = compact_positions(position_ids, sequence.valid)
            end = last_position(position_ids, batch, sequence.valid)
        else:
            self._warn_beyond_context(length, end)
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

    def _warn_beyond_context(self, length: int, end: Tensor) -> None:
        """Warn of positions that were not trained; they are read from the device for very long prompts only."""
        limit = self.family.language.config.max_position_embeddings
        if length > limit and (last := int(end.max())) >= limit:
            warnings.warn(
                f"the prompt's positions go up to {last}, the model was trained on fewer than {limit}; "
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
        if layer == 0 and self.method.needs.embeds:
            state.embeds, state.embeds_visual = hidden, sequence.visual
        if 0 < layer <= len(sequence.deepstack):
            hidden = add(hidden, sequence.visual, sequence.deepstack[layer - 1])
        if state.plan.layers.get(layer, sequence.visual.shape[1]) < sequence.visual.shape[1]:
            self.clock("prefill")
            hidden = self._prune_layer(state, sequence, layer, hidden, kwargs)
            self.clock("selection")
        assert state.layout is not None
        state.layout.enter_layer(sequence.length, sequence.valid)
        needed = self.method.needs.previous_hidden and layer + 1 in state.plan.layers
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
            language=self.family.language,
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
        return hidden if merged is None else put(hidden, sequence.visual, merged)

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
            config=self.family.language.config,
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
        kept = plan.per_layer(family.language.num_layers)
        lengths = (state.seen,) * family.language.num_layers
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
                macs_language=decoder_macs(family.language.config, lengths),
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


def _check_mask(mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedInputError(f"attention_mask must be a tensor (batch, tokens), got {got}")


def _require(condition: Tensor, message: str) -> None:
    """Raise where a condition fails; on a GPU it shows at the next synchronisation, nothing waits for it here.

    Raises:
        UnsupportedInputError: on the CPU.
    """
    if condition.device.type == "cpu" and not condition:
        raise UnsupportedInputError(message)
    torch._assert_async(condition, message)
