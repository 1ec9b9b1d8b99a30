"""The seam between pruning and a model family: how pixels become visual tokens, and where a prompt holds them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vitcop.budget import Geometry
from vitcop.language import LanguageModel
from vitcop.tokens import Needs, VisualTokens

Inputs = Mapping[str, Any]
"""Inputs of the model's forward by name: tensors, a cache, flags."""


class VideoModel(Protocol):
    """What is read of a `...ForConditionalGeneration`. What its config and its parts are called differs by family."""

    config: Any
    model: Any

    def get_input_embeddings(self) -> nn.Module: ...


class Family(ABC):
    """How one model family turns pixels into visual tokens.

    An adapter reads all geometry from the model's config and calls the model's own modules; it copies no forward.

    Attributes:
        base: the module whose forward gets `input_ids` and pixels (`model.model`).
        text: the language model without its head, a module.
        language: its layers' own computations.
    """

    model_types: ClassVar[tuple[str, ...]]
    label: ClassVar[str]
    visual_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    """Forward inputs that the vision side reads."""
    scales_frames: ClassVar[bool] = False
    """Whether `encode` can make a token grid smaller than the model's own, of smaller frames."""

    def __init__(self, model: VideoModel) -> None:
        self.model = model
        self.config = model.config
        self.base = model.model
        self.text = self.base.language_model
        self.language = LanguageModel(self.text)

    @abstractmethod
    def pixels(self, inputs: Inputs) -> Tensor | None:
        """The pixel tensor among forward inputs, None if there is none.

        Raises:
            UnsupportedInputError: visual inputs that this adapter can't prune.
        """

    @abstractmethod
    def geometry(self, inputs: Inputs) -> Geometry:
        """Frames and token grid of each clip in the inputs."""

    @abstractmethod
    def encode(self, inputs: Inputs, geometry: Geometry, needs: Needs, frame_chunk: int) -> Iterator[VisualTokens]:
        """Run the vision tower and projector, `frame_chunk` frames at a time.

        Args:
            needs: which scores of the tower come with the tokens.
        """

    @abstractmethod
    def placeholders(self, input_ids: Tensor) -> Tensor:
        """(B, S) mask of the prompt tokens that visual features replace."""

    def num_placeholders(self, geometry: Geometry) -> int:
        """Placeholders of a clip in its prompt: one for each visual token, and for what else the model puts there."""
        return geometry.num_tokens + geometry.fixed

    def token_offsets(self, geometry: Geometry) -> Tensor:
        """(V,) place of each visual token among a clip's placeholders; the others are `VisualTokens.fixed`."""
        return torch.arange(geometry.num_tokens)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S, D) embeddings of token ids."""
        embeds: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeds

    @abstractmethod
    def vision_macs(self, geometry: Geometry) -> float:
        """Multiply-accumulates of the vision tower and projector for one clip."""

    def position_ids(self, inputs: Inputs) -> Tensor:
        """Position ids of the whole prompt when the caller gave none: (B, S), or (3 or 4, B, S) with M-RoPE."""
        ids = inputs["input_ids"]
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def joined(parts: Tensor | Iterable[Tensor]) -> Tensor:
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

    def _keep(self, name: str, module: nn.Module, args: object, output: Tensor) -> None:
        # A hook that returns nothing leaves the module's output as it is.
        self.outputs[name] = output

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
