"""The shape of both embedded models, their first weights, and the checkpoint folder around them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pipeline.embedded.scenes import FRAME_SIZE

PATCH_SIZE = 8
GRID = FRAME_SIZE // PATCH_SIZE
TOKENS_PER_FRAME = (GRID // 2) ** 2


def build_config(
    tokenizer: PreTrainedTokenizerFast, *, frame_size: int = FRAME_SIZE, layers: int = 8
) -> LlavaOnevisionConfig:
    """SigLIP with 4 layers of width 64 and Qwen2 with `layers` layers of width 96."""
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=frame_size,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        image_grid_pinpoints=[[frame_size, frame_size]],
        choice_scoring="likelihood",  # options are no part of the questions that it is trained on
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, frame_size: int = FRAME_SIZE, layers: int = 8
) -> LlavaOnevisionForConditionalGeneration:
    """An untrained model; the narrow language model starts with weights of standard deviation 0.05, not 0.02."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(build_config(tokenizer, frame_size=frame_size, layers=layers))
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.05)
    model.generation_config.max_new_tokens = 64
    return model


def save_checkpoint(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> None:
    """Write everything that `from_pretrained` and `AutoProcessor` read: weights, tokenizer and processor settings."""
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    # Three settings files: images, videos, and the processor that joins them.
    size = model.config.vision_config.image_size
    pixels = {
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
        "do_convert_rgb": True,
    }
    image = pixels | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "image_grid_pinpoints": [[size, size]],
        "do_pad": True,
    }
    # Frames are sampled before the processor, which must not sample them again.
    video = pixels | {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_sample_frames": False,
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (size // PATCH_SIZE) ** 2,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
    }
    for name, content in (
        ("preprocessor_config.json", image),
        ("video_preprocessor_config.json", video),
        ("processor_config.json", processor),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
