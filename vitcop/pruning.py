"""`prune`: puts a method onto one model by forward hooks, for as long as the context lasts."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, get_args

from torch import nn

from vitcop.cache import Continuation, layout_of
from vitcop.errors import UnsupportedInputError
from vitcop.families import Family, family_of
from vitcop.inputs import Args, Call, Deferred, Kwargs, check_mask, forward_inputs, placeholder_places
from vitcop.language import KVCache
from vitcop.methods.base import Method
from vitcop.mlp import TokenChunks
from vitcop.prefill import Positions, Prefill, PrunedPrefill, new_cache
from vitcop.stats import PruneStats
from vitcop.vision import Clock, VisionCache, VisionStage, repeat_rows

ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"
"""The model's method by which newer versions of `generate` encode pixels, before any forward that a hook could see."""

_pruned_models: set[int] = set()


class Output(Protocol):
    """What is read of the output of `model.model`."""

    past_key_values: KVCache | None


class prune:
    """Prune a model's visual tokens while the context lasts.

    Forward hooks on this one instance do it; they are removed at the end, also after an exception. The model outside
    the context, and inside it at a retention ratio of 1, computes exactly what it computes without. A cache made
    inside remembers its layout, so that decoding, a later turn, and copies of the cache go on correctly inside the
    context; and its record, which `record_of(cache)` gives.

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
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be 'original' or 'compact', got {positions!r}")
        self.model = model
        self.family: Family = family_of(model)
        # `bind` lets a method read what lies beside the model (a measured profile), or refuse the model.
        self.method = method.bind(self.family.model)
        self.token_chunk, self.positions = token_chunk, positions
        self.clock: Clock = clock or (lambda label: None)
        self.stats = PruneStats()
        self._vision = VisionStage(self.family, self.method, frame_chunk, vision, self.clock)
        # Callers may pass inputs by place; the signature gives them their names.
        self._signature = inspect.signature(self.family.base.forward)
        # Of the forward that is under way, and of the `generate` around it.
        self._active: Prefill | Continuation | None = None
        self._visual: Kwargs = {}
        self._undo = contextlib.ExitStack()

    @property
    def _keeps_all(self) -> bool:
        return self.method.retention_ratio == 1

    def __enter__(self) -> PruneStats:
        if id(self.model) in _pruned_models:
            raise RuntimeError("this model is already being pruned; leave the other context first")
        with contextlib.ExitStack() as undo:  # takes back what is there if something fails half-way
            _pruned_models.add(id(self.model))
            undo.callback(_pruned_models.discard, id(self.model))
            self._change_model(undo)
            self._undo = undo.pop_all()
        return self.stats

    def _change_model(self, undo: contextlib.ExitStack) -> None:
        """Put hooks on the model, and wrap what no hook reaches; `undo` gets the way back from each."""
        family = self.family
        # The whole model, its language model and each layer: what a hook can reach.
        undo.callback(family.base.register_forward_pre_hook(self._before_base, with_kwargs=True).remove)
        # Called after a forward that raised as well, so that no state of it stays.
        undo.callback(family.base.register_forward_hook(self._after_base, always_call=True).remove)
        undo.callback(family.text.register_forward_pre_hook(self._before_text, with_kwargs=True).remove)
        # Each layer: pruning before it, and the mask and rotation of the tokens that are left.
        for number, layer in enumerate(family.language.layers):
            hook = functools.partial(self._before_layer, number)
            undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if not self._keeps_all:
                undo.callback(setattr, layer, "mlp", layer.mlp)
                layer.mlp = TokenChunks(layer.mlp, self.token_chunk)
        # `generate` would encode all pixels before any forward; the wrapper sends them on to `_before_base`.
        if (encode := getattr(self.model, ENCODE, None)) is not None:
            undo.callback(vars(self.model).pop, ENCODE, None)  # the class's own shows again
            setattr(self.model, ENCODE, functools.partial(self._before_encoding, encode))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active, self._visual = None, {}
        self._vision.forget()
        self._undo.close()

    # -- the whole model --------------------------------------------------------------------------------------------

    def _before_encoding(self, encode: Callable[[Kwargs], Kwargs], model_kwargs: Kwargs) -> Kwargs:
        """Send the pixels of `generate` on to the forward, where they can be pruned."""
        names = [name for name in self.family.visual_inputs if model_kwargs.get(name) is not None]
        visual = {name: model_kwargs[name] for name in names}
        # Nothing is pruned and the cache is no pruned one: the model encodes as it always does.
        if self._keeps_all and layout_of(model_kwargs.get("past_key_values")) is None:
            self._visual = visual
            return encode(model_kwargs)
        for name in names:
            del model_kwargs[name]
        # Where the model expects encoded features, the pixels travel in their place.
        model_kwargs["mm_encoder_outputs"] = Deferred(visual=visual, length=model_kwargs["position_ids"].shape[-1])
        return model_kwargs

    def _before_base(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Call | None:
        inputs = forward_inputs(self._signature, args, kwargs)
        cache: KVCache | None = inputs.get("past_key_values")
        layout, visual = layout_of(cache), inputs | self._visual_inputs(inputs)
        # A cache that was pruned: decoding, a later turn, or another question on the same clip.
        if cache is not None and layout is not None:
            active = self._active = Continuation(self.family, cache, layout)
            return (), active.enter(inputs, visual)
        # A prompt of text alone goes through the model untouched.
        if self.family.pixels(visual) is None:
            return None
        if cache is not None and cache.get_seq_length():
            raise UnsupportedInputError("visual inputs after a cached prefix can't be pruned; start from the video")
        return self._prefill(visual)

    def _visual_inputs(self, inputs: Kwargs) -> Kwargs:
        """The visual inputs of a forward that `generate` holds back or has encoded."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        if isinstance(encoded, Deferred):
            visual: Kwargs = encoded["visual"]
            return visual
        if encoded and not self._keeps_all:
            raise UnsupportedInputError("encoded features (mm_encoder_outputs) can't be pruned; pass the pixels")
        return self._visual if encoded else {}

    def _prefill(self, inputs: Kwargs) -> Call | None:
        family, pixels, ids = self.family, self.family.pixels(inputs), inputs.get("input_ids")
        if pixels is None or ids is None or inputs.get("inputs_embeds") is not None:
            raise UnsupportedInputError("pass input_ids together with the pixels; inputs_embeds can't be pruned")
        # All counts follow from config and shapes, so the plan is known before any tensor is looked at.
        geometry = family.geometry(inputs)
        # What a prefill is, whether pruned or not.
        shared: Kwargs = {
            "family": family,
            "method": self.method,
            "plan": self.method.plan(geometry),
            "geometry": geometry,
            "batch": len(ids),
            "seen": ids.shape[1],
            "keeps_cache": inputs.get("use_cache") is not False,
        }
        # The unpruned model runs as it is; the state only writes its record.
        if self._keeps_all:
            self._active = Prefill(**shared)
            return None
        cache = new_cache(family, inputs.get("past_key_values"))
        check_mask(inputs.get("attention_mask"))
        # Before the vision tower gets any work: a wrong batch costs nothing, and the one read waits for nothing.
        places = placeholder_places(family, ids, family.num_placeholders(geometry))
        active = self._active = PrunedPrefill(
            **shared, cache=cache, places=places, positions=self.positions, clock=self.clock
        )
        # One row a clip; `repeat_rows` makes one a prompt, where several prompts share a clip.
        encoded = self._vision.encode(inputs, pixels, active.plan, geometry)
        return (), active.enter(inputs, repeat_rows(encoded, len(ids)))

    def _after_base(self, module: nn.Module, args: Args, output: Output | None) -> None:
        active, self._active = self._active, None
        if output is None:  # the forward raised
            return
        if isinstance(active, Prefill):
            self.stats.records.append(active.finish(output.past_key_values))
            # A pruned prefill always needs a cache; a caller who asked for none gets none.
            if not active.keeps_cache:
                output.past_key_values = None
            self.clock("prefill")
        else:
            self.clock("step")

    # -- the language model -----------------------------------------------------------------------------------------

    def _before_text(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # An unpruned prefill does both pieces of work inside the forward, so their phases end here together.
        if isinstance(self._active, Prefill) and self._keeps_all:
            self._active.before_text(kwargs)
            self.clock("vision")
            self.clock("selection")

    def _before_layer(self, layer: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Call | None:
        return None if self._active is None else self._active.before_layer(layer, args, kwargs)
