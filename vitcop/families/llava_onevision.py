"""LLaVA-OneVision: SigLIP tower, projector, 27x27 patches pooled to 14x14 tokens, Qwen2 language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vitcop.budget import Geometry
from vitcop.errors import UnsupportedInputError
from vitcop.families.base import Inputs
from vitcop.families.frame_tower import VideoTower
from vitcop.tokens import Needs, VisualTokens


class LlavaOnevision(VideoTower):
    """Video inputs of `LlavaOnevisionForConditionalGeneration`.

    The model pools features to half the grid after the projector, bilinearly; scores and keys go through the same
    interpolation. The newline embedding at the end of a video is always kept and counts as text. Smaller frames are
    encoded with interpolated position embeddings, as the tower itself offers it.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    label: ClassVar[str] = "LLaVA-OneVision"
    towers: ClassVar[tuple[str, ...]] = ("siglip_vision_model",)
    scales_frames: ClassVar[bool] = True

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.patch_grid
        return math.ceil(height / 2), math.ceil(width / 2)

    def pool(self, patches: Tensor) -> Tensor:
        return functional.interpolate(patches, size=self.grid, mode="bilinear")

    def project(self, frames: Tensor) -> Tensor:
        output = self.base.get_video_features(frames, return_dict=True).pooler_output
        count = frames.shape[1] * math.prod(self.grid)  # a newline may follow, which depends on the version
        return output[:, :count].unflatten(1, (frames.shape[1], -1))

    def num_placeholders(self, geometry: Geometry) -> int:
        return super().num_placeholders(geometry) + 1  # the newline

    def encode(self, inputs: Inputs, geometry: Geometry, needs: Needs, frame_chunk: int) -> Iterator[VisualTokens]:
        small = (geometry.height, geometry.width) != self.grid
        encode = self._encode_small if small else super().encode
        for tokens in encode(inputs, geometry, needs, frame_chunk):
            # The newline stands once, after the clip's last frame, so only the last chunk has it.
            last = tokens.first_frame + tokens.frames == geometry.frames
            newline = self.base.image_newline.expand(len(tokens.features), 1, -1)
            yield replace(tokens, fixed=newline) if last else tokens

    def _encode_small(
        self, inputs: Inputs, geometry: Geometry, needs: Needs, frame_chunk: int
    ) -> Iterator[VisualTokens]:
        if needs.attention or needs.keys:
            raise UnsupportedInputError("scores of the vision tower can't be had of smaller frames")
        frames = self.frames(inputs, geometry)
        for first in range(0, geometry.frames, frame_chunk):
            tokens = self._small_tokens(frames[:, first : first + frame_chunk], geometry)
            yield VisualTokens(features=tokens, height=geometry.height, width=geometry.width, first_frame=first)

    def _small_tokens(self, frames: Tensor, geometry: Geometry) -> Tensor:
        """(B, F, N, D) tokens of frames shrunk to the geometry's grid; otherwise as the model makes them."""
        patches = self.patches(geometry)
        # Twice the wanted grid in patches, as pooling halves it.
        size = [count * self.vision.patch_size for count in patches]
        # (B * F, channels, height, width), antialiased like the processors shrink
        pixels = functional.interpolate(frames.flatten(0, 1), size=size, mode="bilinear", antialias=True)
        # (B * F, P, d) of one vision layer or several, side by side
        output = self.tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True, return_dict=True)
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        # (B * F, P, D) patches in raster order
        projected = self.base.multi_modal_projector(torch.cat([output.hidden_states[i] for i in layers], dim=-1))
        # Pooled as the model pools: (B * F, D, rows, columns), bilinearly to the geometry's grid.
        grid = projected.transpose(1, 2).unflatten(-1, patches)
        pooled = functional.interpolate(grid, size=(geometry.height, geometry.width), mode="bilinear")
        return pooled.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])

    def patches(self, geometry: Geometry) -> tuple[int, int]:
        # Pooling halves the grid, so twice as many patches; never more than at full size.
        height, width = self.patch_grid
        return min(2 * geometry.height, height), min(2 * geometry.width, width)

    def _projected(self, geometry: Geometry) -> int:
        height, width = self.patches(geometry)
        return height * width
