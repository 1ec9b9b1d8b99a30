"""Model families that can be pruned. A new one is a file here and a line in `ADAPTERS`."""

from __future__ import annotations

from typing import cast

from torch import nn

from vitcop.errors import UnsupportedModelError
from vitcop.families.base import Family, Inputs, VideoModel
from vitcop.families.internvl import InternVL
from vitcop.families.llava import Llava
from vitcop.families.llava_next_video import LlavaNextVideo
from vitcop.families.llava_onevision import LlavaOnevision
from vitcop.families.qwen_vl import Qwen2_5VL, Qwen2VL, Qwen3VL
from vitcop.families.video_llava import VideoLlava

ADAPTERS: tuple[type[Family], ...] = (
    LlavaOnevision,
    LlavaNextVideo,
    VideoLlava,
    Llava,
    Qwen2VL,
    Qwen2_5VL,
    Qwen3VL,
    InternVL,
)
FAMILIES: dict[str, type[Family]] = {name: adapter for adapter in ADAPTERS for name in adapter.model_types}


def family_of(model: nn.Module) -> Family:
    """Return the adapter for a model.

    Raises:
        UnsupportedModelError: no family here has the model's type, or the model is a part of one (`model.model`).
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        known = ", ".join(adapter.label for adapter in ADAPTERS)
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {model_type!r}) can't be pruned; known are {known}"
        )
    if not hasattr(model, "model"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language model head; pass the whole model (...ForConditionalGeneration)"
        )
    return FAMILIES[model_type](cast(VideoModel, model))


__all__ = ["FAMILIES", "Family", "Inputs", "family_of"]
