"""InternVL3: InternViT tower, 32x32 patches shuffled into 16x16 tokens, Qwen2 or Qwen3 language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from vitcop.errors import UnsupportedModelError
from vitcop.families.base import VideoModel
from vitcop.families.frame_tower import PictureTower


class InternVL(PictureTower):
    """Inputs of `InternVLForConditionalGeneration`: frames of a video, or the tiles of a picture.

    The frames of a video come as pictures with text ("Frame1: ") between them. Pixel shuffle makes one token of
    2x2 patches; scores and keys are averaged over these. Queries and keys are read after the norm that large towers
    have on them.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    label: ClassVar[str] = "InternVL3"
    towers: ClassVar[tuple[str, ...]] = ("internvl_vision",)

    def __init__(self, model: VideoModel) -> None:
        super().__init__(model)
        if self.keeps_cls:
            raise UnsupportedModelError(
                f"{self.label} with vision_feature_select_strategy='full' can't be pruned; pixel shuffle needs a grid"
            )

    @property
    def patch_grid(self) -> tuple[int, int]:
        (height, width), (patch_height, patch_width) = self.vision.image_size, self.vision.patch_size
        return height // patch_height, width // patch_width

    @property
    def _merge(self) -> int:
        return round(1 / self.config.downsample_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.patch_grid
        return height // self._merge, width // self._merge

    def pool(self, patches: Tensor) -> Tensor:
        return functional.avg_pool2d(patches, self._merge)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layer

    def queries_and_keys(self, layer: Any) -> dict[str, nn.Module]:
        return {"queries": layer.attention.q_norm, "keys": layer.attention.k_norm}
