"""The seam between pruning and a model family: everything that differs between families is asked here."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitcop.budget import Geometry
from vitcop.methods.base import Method
from vitcop.tokens import VisualTokens


class UnsupportedModelError(TypeError):
    """The model belongs to no family that can be pruned."""


class UnsupportedInputError(ValueError):
    """The model can be pruned, but not on these inputs or with this kind of generation."""


class Family(ABC):
    """How one model family turns pixels into visual tokens, and where its language model keeps what.

    An adapter reads all geometry from the model's config and calls the model's own modules; it copies no forward.

    Attributes:
        base: the module whose forward gets `input_ids` and pixels (`model.model`).
        text: the language model; its `layers` are the decoder layers.
    """

    model_types: ClassVar[tuple[str, ...]]
    label: ClassVar[str]
    visual_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    """Forward inputs that the vision side reads."""
    scales_frames: ClassVar[bool] = False
    """Whether `encode` can make a token grid smaller than the model's own, of smaller frames."""

    def __init__(self, model: Any) -> None:
        # Typed loosely: what a family's modules are called is known to its adapter, not to the type checker.
        self.model: Any = model
        self.config: Any = model.config
        self.base: Any = self.model.model
        self.text: Any = self.base.language_model
        self.text_config = self.text.config
        kinds = set(getattr(self.text_config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {', '.join(sorted(kinds))} layers; only full attention can be pruned"
            )

    @property
    def layers(self) -> Any:
        return self.text.layers

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    # -- visual side ------------------------------------------------------------------------------------------------

    @abstractmethod
    def pixels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The pixel tensor among forward inputs, None if there is none.

        Raises:
            UnsupportedInputError: visual inputs that this adapter can't prune.
        """

    @abstractmethod
    def geometry(self, inputs: Mapping[str, Any]) -> Geometry:
        """Frames and token grid of each clip in the inputs."""

    @abstractmethod
    def encode(
        self, inputs: Mapping[str, Any], geometry: Geometry, method: Method, frame_chunk: int
    ) -> Iterator[VisualTokens]:
        """Run the vision tower and projector, `frame_chunk` frames at a time."""

    @abstractmethod
    def placeholders(self, input_ids: Tensor) -> Tensor:
        """(B, S) mask of the prompt tokens that visual features replace."""

    def token_offsets(self, geometry: Geometry) -> Tensor:
        """(V,) place of each visual token among a clip's placeholders; the others are `VisualTokens.fixed`."""
        return torch.arange(geometry.num_tokens)

    @abstractmethod
    def vision_macs(self, geometry: Geometry) -> float:
        """Multiply-accumulates of the vision tower and projector for one clip."""

    # -- language side ----------------------------------------------------------------------------------------------

    def position_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        """Position ids of the whole prompt when the caller gave none: (B, S), or (3 or 4, B, S) with M-RoPE."""
        ids = inputs["input_ids"]
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def attention_scale(self, layer: int) -> float:
        return self.layers[layer].self_attn.scaling

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm that the language model ends with, of hidden states (B, S, D) from any layer."""
        return self.text.norm(hidden)

    def rotary_at(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, S, d_h) of text tokens at `positions` (B, S), in the dtype of `hidden`."""
        return self.text.rotary_emb(hidden, positions)

    def queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Queries (B, H, S, d_h), not rotated yet, that `layer` computes from its input `hidden` (B, S, D)."""
        return self._project(layer, "q", hidden)

    def rotated_queries(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Queries (B, H, S, d_h) that `layer` computes from its input `hidden` (B, S, D)."""
        return rotate(self._project(layer, "q", hidden), rotary)

    def rotated_keys(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Keys (B, G, S, d_h) that `layer` computes from its input `hidden` (B, S, D)."""
        return rotate(self._project(layer, "k", hidden), rotary)

    def plain_keys(self, layer: int, hidden: Tensor) -> Tensor:
        """Keys (B, G, S, d_h) that `layer` computes from its input `hidden` (B, S, D), before any norm or rotation."""
        return self._heads(layer, "k", hidden).transpose(1, 2)

    def _project(self, layer: int, kind: str, hidden: Tensor) -> Tensor:
        states = self._heads(layer, kind, hidden)
        norm = getattr(self.layers[layer].self_attn, f"{kind}_norm", None)
        return (norm(states) if norm is not None else states).transpose(1, 2)

    def _heads(self, layer: int, kind: str, hidden: Tensor) -> Tensor:
        """Projection (B, S, heads, d_h) of a layer's input."""
        block = self.layers[layer]
        states = getattr(block.self_attn, f"{kind}_proj")(block.input_layernorm(hidden))
        return states.unflatten(-1, (-1, block.self_attn.head_dim))


def rotate(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding, half-split form: states (B, H, S, d_h), cosine and sine (B, S, d_h)."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    low, high = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-high, low), dim=-1) * sin


def joined(parts: Any) -> Tensor:
    """One tensor of what a model gives whole or in parts along the first axis; which it is depends on its version."""
    return parts if isinstance(parts, Tensor) else torch.cat(tuple(parts))


class Capture:
    """Keeps the outputs of some modules while it is entered."""

    def __init__(self, **modules: nn.Module) -> None:
        self.modules = modules
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> dict[str, Tensor]:
        self.handles = [
            module.register_forward_hook(functools.partial(self._keep, name)) for name, module in self.modules.items()
        ]
        return self.outputs

    def _keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs[name] = output

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
