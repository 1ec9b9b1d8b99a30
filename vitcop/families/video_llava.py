"""Video-LLaVA: LanguageBind (CLIP) tower, 16x16 tokens and the CLS token of each frame, Llama language model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vitcop.families.frame_tower import VideoTower


class VideoLlava(VideoTower):
    """Video inputs of `VideoLlavaForConditionalGeneration`.

    The CLS token of each frame enters the language model. It is what stage I scores patches by and has no place in
    the grid, so it can't be pruned: one token of 257, which is part of every budget.
    """

    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    label: ClassVar[str] = "Video-LLaVA"
    towers: ClassVar[tuple[str, ...]] = ("clip_vision_model",)

    @property
    def keeps_cls(self) -> bool:
        return True  # of videos, whatever `vision_feature_select_strategy` says of pictures

    @property
    def tower(self) -> Any:
        return self.base.video_tower

    def project(self, frames: Tensor) -> Tensor:
        output: Any = self.base.get_video_features(frames, return_dict=True)
        return output.pooler_output.unflatten(0, frames.shape[:2])
