"""LLaVA-NeXT-Video: CLIP tower, 24x24 patches pooled to 12x12 tokens before the projector, Llama language model."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from vitcop.errors import UnsupportedModelError
from vitcop.families.base import VideoModel, joined
from vitcop.families.frame_tower import VideoTower


class LlavaNextVideo(VideoTower):
    """Video inputs of `LlavaNextVideoForConditionalGeneration`.

    Scores and keys are averaged over the patches that the model pools into a token, whatever its own way to pool.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    label: ClassVar[str] = "LLaVA-NeXT-Video"

    def __init__(self, model: VideoModel) -> None:
        super().__init__(model)
        if self.keeps_cls:
            raise UnsupportedModelError(
                f"{self.label} with vision_feature_select_strategy='full' can't be pruned; its pooling needs a grid"
            )

    @property
    def _stride(self) -> int:
        return self.config.spatial_pool_stride

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.patch_grid
        return height // self._stride, width // self._stride

    def pool(self, patches: Tensor) -> Tensor:
        return functional.avg_pool2d(patches, self._stride)

    def project(self, frames: Tensor) -> Tensor:
        output: Any = self.base.get_video_features(frames, return_dict=True)
        features = joined(output.pooler_output)
        return features.reshape(*frames.shape[:2], math.prod(self.grid), features.shape[-1])
