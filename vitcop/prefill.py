"""A prefill that is pruned: the prompt on its way from the vision tower through the layers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vitcop.budget import Geometry, Plan
from vitcop.cache import LAYOUT, RECORD, UNPRUNED_LAYOUT, CacheLayout, check_cache, holds_any_lengths
from vitcop.cost import decoder_macs
from vitcop.errors import UnsupportedInputError
from vitcop.families import Family, Inputs
from vitcop.inputs import Args, Call, Kwargs, hidden_states, stage_mask, text_inputs, with_hidden_states
from vitcop.language import KVCache, Rotary
from vitcop.methods.base import Method
from vitcop.selection import Selection, apply_selection, kept_mass, take, true_indices
from vitcop.stats import PrefillRecord
from vitcop.tokens import LayerTokens
from vitcop.vision import Clock, Encoded

Positions = Literal["original", "compact"]


@dataclass
class Sequence:
    """The prompt on its way through the layers: what of it is left, and where the visual tokens are.

    Attributes:
        visual: (B, K) positions of visual tokens in the sequence, ascending.
        index: (B, K) their numbers within the clip.
        labels: (B, K) or None.
        mass: (B, K) tokens that each visual token stands for, or None; see Proportional.
        valid: (B, S) bool or None, False at padding.
        after: (B,) tokens after the video, which stay.
        deepstack: side features (B, K, D), one for each of the model's first layers.
        length: S.
        rotary: of the tokens left; None until a layer has been pruned.
        mask: attention mask of the current stage; made when first needed.
    """

    visual: Tensor
    index: Tensor
    labels: Tensor | None
    mass: Tensor | None
    valid: Tensor | None
    after: Tensor
    deepstack: tuple[Tensor, ...]
    length: int
    rotary: Rotary | None = None
    mask: tuple[Any] | None = None

    def keep(self, selection: Selection) -> Tensor:
        """Shrink to the selection; return the (B, S') positions of the sequence that stay."""
        batch, count = self.visual.shape
        # Everything stays but the visual tokens that are not kept.
        alive = torch.ones(batch, self.length, dtype=torch.bool, device=self.visual.device)
        alive.scatter_(1, self.visual, False).scatter_(1, take(self.visual, selection.keep), True)
        self.length += selection.keep.shape[1] - count
        positions = true_indices(alive, self.length)
        # (B, S) where each token that stays will stand
        place = alive.long().cumsum(1) - 1
        self.visual = place.gather(1, take(self.visual, selection.keep))
        self.index = take(self.index, selection.keep)
        if self.labels is not None:
            self.labels = take(self.labels, selection.keep)
        if self.mass is not None:
            self.mass = kept_mass(selection, self.mass)
        self.valid = None if self.valid is None else take(self.valid, positions)
        self.deepstack = tuple(take(side, selection.keep) for side in self.deepstack)
        return positions

    def bias(self, alpha: float) -> Tensor | None:
        """(B, S) what is added to the tokens' logits: `alpha` times the log of a visual token's mass, 0 for text."""
        if self.mass is None:
            return None
        return self.mass.new_zeros(len(self.mass), self.length).scatter_(1, self.visual, alpha * self.mass.log())


@dataclass(kw_only=True)
class Prefill:
    """State of one prefill: made when it begins, dropped when it ends. This one leaves the model as it is.

    Attributes:
        batch: rows.
        seen: tokens of the unpruned prompt.
        keeps_cache: whether the caller gets the cache (`use_cache`); pruning needs one either way.
        kept_index: see PrefillRecord.
        layout: of the cache being filled; None until the language model is entered.
    """

    family: Family
    method: Method
    plan: Plan
    geometry: Geometry
    batch: int
    seen: int
    keeps_cache: bool
    kept_index: dict[str, Tensor] = field(default_factory=dict)
    layout: CacheLayout | None = None
    layout_attribute: ClassVar[str] = UNPRUNED_LAYOUT

    def before_text(self, kwargs: Kwargs) -> None:
        """Note where the prompt's positions end, so that its cache can go on among others (`vitcop.join`).

        Args:
            kwargs: what the language model is given.
        """
        position_ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return  # a mask of the caller's own making: what it hides is not known
        device = kwargs["inputs_embeds"].device
        if position_ids is None:  # the model counts from 0 over padding and tokens alike
            position_ids = torch.arange(self.seen, device=device)[None]
            # (B,) position of each row's last token
            end = position_ids[:, -1].expand(self.batch)
        else:
            end = last_position(position_ids, self.batch, None if mask is None else mask.bool())
        self.layout = CacheLayout(
            seen=self.seen,
            next_position=end + 1,
            tail=torch.full((self.batch,), self.seen - 1, device=device),
            # Nothing is pruned, so all layers are one stage.
            stage_of_layer=[0] * self.family.language.num_layers,
        )
        self.layout.enter_stage(self.seen, None if mask is None else mask.bool(), None)

    def before_layer(self, layer: int, args: Args, kwargs: Kwargs) -> Call | None:
        """The arguments that a decoder layer gets instead; None where it gets its own."""
        return None

    def lengths(self) -> tuple[int, ...]:
        """Tokens that each layer has seen."""
        return (self.seen,) * self.family.language.num_layers

    def finish(self, cache: KVCache | None) -> PrefillRecord:
        """What this prefill kept and cost; it also goes along with the cache."""
        family, geometry = self.family, self.geometry
        lengths, fixed = self.lengths(), geometry.fixed
        # What each layer saw, by plan: the same for all rows, and known without asking the device.
        kept = tuple(count + fixed for count in self.plan.per_layer(family.language.num_layers))
        # Of all rows; what a record says is of one.
        stored = 0 if cache is None else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        record = PrefillRecord(
            method=self.method.describe(),
            batch=self.batch,
            grid=(geometry.frames, geometry.height, geometry.width),
            fixed=fixed,
            kept_per_layer=kept,
            stages={name: count + fixed for name, count in self.plan.stages().items()},
            # The first layer's tokens less the visual ones among them.
            prompt_tokens=lengths[0] - kept[0],
            kv_bytes=stored // self.batch,
            macs_vision=family.vision_macs(self.plan.encoded(geometry)),
            macs_language=decoder_macs(family.language.config, lengths),
            kept_index=self.kept_index,
        )
        if cache is not None:
            setattr(cache, RECORD, record)
            # Caches of one length for all layers need no layout; nor is there one after a mask of the caller's own.
            if self.layout is not None and holds_any_lengths(cache):
                setattr(cache, self.layout_attribute, self.layout)
        return record


@dataclass(kw_only=True)
class PrunedPrefill(Prefill):
    """A prefill in which tokens are left out.

    Attributes:
        places: (B, P) positions of the clip's placeholders in the prompt.
        sequence: there from `enter` on.
        previous_hidden, embeds, embeds_visual: see LayerTokens.
    """

    cache: KVCache
    places: Tensor
    positions: Positions
    clock: Clock
    sequence: Sequence = field(init=False)
    layout_attribute: ClassVar[str] = LAYOUT
    previous_hidden: Tensor | None = None
    embeds: Tensor | None = None
    embeds_visual: Tensor | None = None

    def enter(self, inputs: Inputs, encoded: Encoded) -> Kwargs:
        """Replace ids and pixels by the embeddings of the tokens that stay, with their original positions.

        Args:
            encoded: what the stage before the model left of the clip, with one row for each prompt.
        """
        ids, length = inputs["input_ids"], self.seen
        mask: Tensor | None = inputs.get("attention_mask")
        valid = None if mask is None else mask.bool()
        # (B, V) where visual tokens stand, and (B, X) the placeholders that always stay
        visual, fixed_places = self._split_places()
        self.sequence = sequence = Sequence(
            visual=visual,
            index=torch.arange(visual.shape[1], device=ids.device).expand(self.batch, -1),
            labels=None,
            mass=None,
            valid=valid,
            # (B,) tokens behind the last placeholder
            after=length - 1 - self.places[:, -1],
            deepstack=(),
            length=length,
        )
        # (B, S') positions in the prompt of what stays
        positions = sequence.keep(Selection(keep=encoded.index))
        sequence.labels, sequence.mass, sequence.deepstack = encoded.labels, encoded.mass, encoded.deepstack
        self.kept_index[self.plan.name(-1)] = sequence.index

        # (B, S', D) embeddings of what stays, the visual features in the place of their placeholders'
        embeds = self.family.embed(take(ids, positions))
        embeds = put(embeds, sequence.visual, encoded.features)
        # Fixed placeholders are never dropped; where they stand now is found by their old places.
        if encoded.fixed is not None:
            places = torch.searchsorted(positions.contiguous(), fixed_places.contiguous())
            embeds = put(embeds, places, encoded.fixed)
        position_ids, end = self._position_ids(inputs, positions, valid)
        self.layout = CacheLayout(
            seen=self.seen,
            next_position=end + 1,
            # A question that tokens were chosen by can't be taken back; other text after the video can.
            tail=sequence.after * (not self.method.query_aware),
            stage_of_layer=self.plan.stage_of_layer(self.family.language.num_layers),
        )
        self._enter_stage()
        return text_inputs(inputs) | {
            "inputs_embeds": embeds,
            "attention_mask": sequence.valid,
            "position_ids": position_ids,
            # Stages read the keys of the layer before from the cache, so there is one whatever the caller asked for.
            "past_key_values": self.cache,
            "use_cache": True,
        }

    @property
    def _layout(self) -> CacheLayout:
        """The layout, which is there from `enter` on."""
        assert self.layout is not None
        return self.layout

    def _split_places(self) -> tuple[Tensor, Tensor]:
        """Positions (B, V) of the visual tokens, and (B, X) of the clip's other placeholders."""
        count = self.places.shape[1]
        with torch.device(self.places.device):  # made there: copying would wait for all that the device has to do
            offsets = self.family.token_offsets(self.geometry)
        # (P,) True at placeholders that hold no visual token
        others = torch.ones(count, dtype=torch.bool, device=offsets.device).index_fill_(0, offsets, False)
        return self.places[:, offsets], self.places[:, true_indices(others[None], count - len(offsets))[0]]

    def _position_ids(self, inputs: Inputs, positions: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Position ids of the tokens at `positions` (B, S'), and the last one (B,) of the whole prompt.

        Args:
            valid: (B, S) of the whole prompt.
        """
        position_ids: Tensor | None = inputs.get("position_ids")
        if position_ids is None:
            position_ids = self.family.position_ids(inputs)
        # Of the whole prompt: it may end with a visual token that is pruned.
        end = last_position(position_ids, self.batch, valid)
        position_ids = slice_positions(position_ids, positions)
        if self.positions == "compact":
            position_ids = compact_positions(position_ids, self.sequence.valid)
            return position_ids, last_position(position_ids, self.batch, self.sequence.valid)
        self._warn_beyond_context(end)
        return position_ids, end

    def _warn_beyond_context(self, end: Tensor) -> None:
        """Warn of positions that were not trained; they are read from the device for very long prompts only."""
        limit = self.family.language.config.max_position_embeddings
        if self.seen > limit and (last := int(end.max())) >= limit:
            warnings.warn(
                f"the prompt's positions go up to {last}, the model was trained on fewer than {limit}; "
                "positions are kept as they are (prune(..., positions='compact') numbers the kept tokens anew)",
                stacklevel=2,
            )

    # -- inside the language model ----------------------------------------------------------------------------------

    def before_layer(self, layer: int, args: Args, kwargs: Kwargs) -> Call:
        """Prune where the plan has a stage, and give the layer what belongs to the tokens that are left."""
        sequence, needs = self.sequence, self.method.needs
        hidden = hidden_states(args, kwargs)
        # Kept for methods that compare text with what entered the model, before any layer mixed them.
        if layer == 0 and needs.embeds:
            self.embeds, self.embeds_visual = hidden, sequence.visual
        # Qwen3-VL adds side features to the visual tokens after its first layers.
        if 0 < layer <= len(sequence.deepstack):
            hidden = add(hidden, sequence.visual, sequence.deepstack[layer - 1])
        # The plan's count may be what is there already: then only the stage is noted.
        if layer in self.plan.layers:
            # A stage that keeps all that is left only begins a new stage of the cache.
            if self.plan.layers[layer] < sequence.visual.shape[1]:
                self.clock("prefill")
                hidden = self._prune(layer, hidden, kwargs)
                self.clock("selection")
            self._enter_stage()
        # A layer's input is held only if the next layer prunes by it.
        self.previous_hidden = hidden if needs.previous_hidden and layer + 1 in self.plan.layers else None
        # Layers rotate by `position_embeddings`; in position ids with gaps, flash attention would see packed prompts.
        changed: Kwargs = {"position_ids": None}
        bias = self._layout.bias[-1]
        if sequence.rotary is not None:
            changed |= {"position_embeddings": sequence.rotary}
        # Until a layer has pruned, rotation and mask that the model made still fit.
        if sequence.rotary is not None or bias is not None:
            # In a tuple, as the mask itself may be None; all layers of a stage share it.
            if sequence.mask is None:
                config = self.family.language.config
                sequence.mask = (stage_mask(config, hidden, sequence.valid, self.cache, layer, bias),)
            changed |= {"attention_mask": sequence.mask[0]}
        return with_hidden_states(hidden, args, kwargs | changed)

    def _enter_stage(self) -> None:
        sequence = self.sequence
        self._layout.enter_stage(sequence.length, sequence.valid, sequence.bias(self.method.bias))

    def _prune(self, layer: int, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """Let the method choose among the visual tokens in `hidden` (B, S, D); what is left of it (B, S', D)."""
        sequence = self.sequence
        if sequence.rotary is None:  # one row for all prompts where they share positions
            cos, sin = kwargs["position_embeddings"]
            sequence.rotary = cos.expand(self.batch, -1, -1), sin.expand(self.batch, -1, -1)
        tokens = self._layer_tokens(layer, hidden, sequence.rotary)
        # The method sees the whole sequence and chooses among its K visual tokens.
        selection = self.method.select_layer(tokens, self.plan, self.geometry)
        # (B, K', D) merged tokens, made while the dropped ones are still there
        merged = None if selection.merge_into is None else apply_selection(selection, tokens.features)
        # Tokens keep the rotation of their original positions.
        cos, sin = sequence.rotary
        positions = sequence.keep(selection)
        self.kept_index[self.plan.name(layer)] = sequence.index
        sequence.rotary, sequence.mask = (take(cos, positions), take(sin, positions)), None
        hidden = take(hidden, positions)
        return hidden if merged is None else put(hidden, sequence.visual, merged)

    def _layer_tokens(self, layer: int, hidden: Tensor, rotary: Rotary) -> LayerTokens:
        previous = self.cache.layers[layer - 1]
        return LayerTokens(
            language=self.family.language,
            layer=layer,
            hidden=hidden,
            visual=self.sequence.visual,
            index=self.sequence.index,
            labels=self.sequence.labels,
            previous_keys=previous.keys,
            previous_values=previous.values,
            previous_hidden=self.previous_hidden,
            embeds=self.embeds,
            embeds_visual=self.embeds_visual,
            valid=self.sequence.valid,
            rotary=rotary,
            after=self.sequence.after,
            next_position=self._layout.next_position,
        )

    # -- afterwards -------------------------------------------------------------------------------------------------

    def lengths(self) -> tuple[int, ...]:
        return self._layout.per_layer


def new_cache(family: Family, given: KVCache | None) -> KVCache:
    """The cache that a pruned prefill fills: the caller's, or a new one.

    Raises:
        UnsupportedInputError: the caller's can't hold layers of different lengths.
    """
    cache: KVCache = DynamicCache(config=family.language.config) if given is None else given
    check_cache(cache)
    return cache


def put(tokens: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Copy of `tokens` (B, S, D) with `values` (B, K, D) at the positions `where` (B, K)."""
    index = where[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.scatter(1, index, values.to(tokens.dtype).expand(*where.shape, -1))


def add(tokens: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Copy of `tokens` (B, S, D) with `values` (B, K, D) added at the positions `where` (B, K)."""
    return put(tokens, where, take(tokens, where) + values.to(tokens.dtype))


def slice_positions(position_ids: Tensor, positions: Tensor) -> Tensor:
    """Position ids (..., B or 1, S) of the tokens at `positions` (B, S') -> (..., B, S')."""
    batch, length = positions.shape
    # Rows of one position grid may be shared by all prompts; gathering needs one row each.
    full = position_ids.expand(*position_ids.shape[:-2], batch, position_ids.shape[-1])
    return full.gather(-1, positions.expand(*full.shape[:-2], batch, length))


def compact_positions(position_ids: Tensor, valid: Tensor | None) -> Tensor:
    """Positions (B, S) of the same tokens, numbered from 0; padding counts for nothing."""
    if position_ids.dim() != 2:
        raise UnsupportedInputError("positions='compact' needs one-dimensional positions; this model uses M-RoPE")
    if valid is None:
        return torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


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
    # (B, 1) place of the last token that is no padding
    last = (torch.arange(valid.shape[1], device=valid.device) * valid).amax(dim=1, keepdim=True)
    return position_ids.expand(batch, -1).gather(1, last).squeeze(1)
