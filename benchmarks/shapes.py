"""Models of real shapes with random weights, and clips for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from pipeline.embedded import MODEL_DIR

QWEN2_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN2_05B: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN_GRID = 28  # patches along each side of a frame: 392 pixels, 14 x 14 tokens


def embedded() -> PretrainedConfig:
    return AutoConfig.from_pretrained(MODEL_DIR)


def llava_onevision(text: dict[str, Any], **vision: Any) -> PretrainedConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**(SO400M | vision)),
        text_config=Qwen2Config(max_position_embeddings=32768, rope_parameters=_rope(), **text),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def qwen2_5_vl_7b() -> PretrainedConfig:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    text = QWEN2_7B | {"max_position_embeddings": 128000, "rope_parameters": _rope(mrope_section=[16, 24, 24])}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text)


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1_000_000.0, **more}


# Thin: full width and fewer layers, for a CPU. The peak above the weights is that of one layer, beside the KV cache.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "embedded": embedded,
    "llava-onevision-0.5b": lambda: llava_onevision(QWEN2_05B),
    "llava-onevision-0.5b-thin": lambda: llava_onevision(QWEN2_05B, num_hidden_layers=2),
    "llava-onevision-7b": lambda: llava_onevision(QWEN2_7B),
    "llava-onevision-7b-thin": lambda: llava_onevision(QWEN2_7B | {"num_hidden_layers": 16}, num_hidden_layers=2),
    "qwen2.5-vl-7b": qwen2_5_vl_7b,
}


def build_model(shape: str, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """A model of random weights, in eval mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(SHAPES[shape](), dtype=dtype, attn_implementation=attention)
    return model.eval()


def make_inputs(model: PreTrainedModel, frames: int, before: int = 16, after: int = 32) -> dict[str, Tensor]:
    """One prompt: text, a clip of `frames` frames, text."""
    config, device = model.config, model.device
    if config.model_type == "qwen2_5_vl":
        visual, count = _patches(config.vision_config, frames, device)
    else:
        side = config.vision_config.image_size
        visual = {"pixel_values_videos": torch.randn(1, frames, 3, side, side, device=device, dtype=model.dtype)}
        count = frames * (-(-(side // config.vision_config.patch_size) // 2)) ** 2 + 1
    visual["pixel_values_videos"] = visual["pixel_values_videos"].to(model.dtype)
    video, text = config.video_token_id, torch.arange(before + after) % 16 + 10
    ids = torch.cat((text[:before], torch.full((count,), video), text[before:])).to(device)[None]
    if config.model_type == "qwen2_5_vl":
        visual["mm_token_type_ids"] = (ids == video).int() * 2
    return {"input_ids": ids, **visual}


def _patches(vision: Any, frames: int, device: torch.device) -> tuple[dict[str, Tensor], int]:
    slices = -(-frames // vision.temporal_patch_size)
    patches = slices * QWEN_GRID**2
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[slices, QWEN_GRID, QWEN_GRID]], device=device)
    pixels = torch.randn(patches, width, device=device)
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}, patches // vision.spatial_merge_size**2


def shape_numbers(model: PreTrainedModel) -> dict[str, Any]:
    """The numbers of a model's shape, of its language model and its vision tower."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "image_size",
        "patch_size",
    )
    described = {}
    for part in ("text_config", "vision_config"):
        config = getattr(model.config, part)
        layers = getattr(config, "num_hidden_layers", None) or config.depth
        numbers = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
        described[part.removesuffix("_config")] = {"layers": layers, **numbers}
    return described
