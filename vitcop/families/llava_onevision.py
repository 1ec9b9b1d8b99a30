"""LLaVA-OneVision: SigLIP tower, projector, 27x27 patches pooled to 14x14 tokens, Qwen2 language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from vitcop.budget import Geometry
from vitcop.families.frame_tower import VideoTower
from vitcop.methods.base import Method
from vitcop.tokens import VisualTokens


class LlavaOnevision(VideoTower):
    """Video inputs of `LlavaOnevisionForConditionalGeneration`.

    The model pools features to half the grid after the projector, bilinearly; scores and keys go through the same
    interpolation. The newline embedding at the end of a video is always kept and counts as text.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    label: ClassVar[str] = "LLaVA-OneVision"

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.patch_grid
        return math.ceil(height / 2), math.ceil(width / 2)

    def pool(self, patches: Tensor) -> Tensor:
        return functional.interpolate(patches, size=self.grid, mode="bilinear")

    def project(self, frames: Tensor) -> Tensor:
        output = self.base.get_video_features(frames, return_dict=True).pooler_output
        return output[:, :-1].unflatten(1, (frames.shape[1], -1))  # the last one is the newline

    def encode(
        self, inputs: Mapping[str, Any], geometry: Geometry, method: Method, frame_chunk: int
    ) -> Iterator[VisualTokens]:
        for tokens in super().encode(inputs, geometry, method, frame_chunk):
            last = tokens.first_frame + tokens.frames == geometry.frames
            newline = self.base.image_newline.expand(len(tokens.features), 1, -1)
            yield replace(tokens, fixed=newline) if last else tokens

    def _projected(self, geometry: Geometry) -> int:
        height, width = self.patch_grid
        return height * width
