"""Tiny checkpoints, built from configs with random weights and saved as ordinary Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

PAD, END = "<|endoftext|>", "<|im_end|>"
TURN_TEMPLATE = (
    "{{%- for message in messages -%}}"
    "{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{%- for part in message['content'] if part['type'] == 'video' -%}}{{{{ '{video}' }}}}{{%- endfor -%}}"
    "{{%- for part in message['content'] if part['type'] == 'text' -%}}{{{{ part['text'] }}}}{{%- endfor -%}}"
    "{{{{ '<|im_end|>\n' }}}}"
    "{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ '<|im_start|>assistant\n' }}}}{{%- endif -%}}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # large, so that what a tiny random model says depends on what it sees
}


def save_llava_onevision(folder: Path) -> Path:
    """SigLIP on 64x64 frames, 16 tokens a frame, and Qwen2 with 4 layers."""
    tokenizer = build_tokenizer("<video>\n", ("<image>", "<video>"))
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**TEXT, **_special_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[64, 64]],
    )
    frames = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": {"height": 64, "width": 64},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return _save(folder, LlavaOnevisionForConditionalGeneration, config, tokenizer, frames)


def save_qwen2_5_vl(folder: Path) -> Path:
    """Patches of 14, 2x2 merged; one windowed and one full-attention vision layer."""
    tokenizer = build_tokenizer("<|vision_start|><|video_pad|><|vision_end|>", _QWEN_TOKENS)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = TEXT | _special_ids(tokenizer) | {"rope_parameters": rope}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_qwen_ids(tokenizer))
    frames = _qwen_frames("Qwen2VLVideoProcessor", patch_size=14)
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, frames)


def save_qwen3_vl(folder: Path) -> Path:
    """Patches of 16, 2x2 merged; timestamps between the frames; one deepstack layer."""
    tokenizer = build_tokenizer("<|vision_start|><|video_pad|><|vision_end|>", _QWEN_TOKENS)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = TEXT | _special_ids(tokenizer) | {"rope_parameters": rope, "head_dim": 8}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_ids(tokenizer))
    frames = _qwen_frames("Qwen3VLVideoProcessor", patch_size=16)
    return _save(folder, Qwen3VLForConditionalGeneration, config, tokenizer, frames)


FAMILIES = {
    "llava_onevision": save_llava_onevision,
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
}

_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def build_tokenizer(video: str, tokens: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones; `video` is what the chat template writes for a video."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, "<|im_start|>", END, *tokens)])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = TURN_TEMPLATE.format(video=video)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, chat_template=template)


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("vision_start", "vision_end", "image", "video")
    return {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(names, _QWEN_TOKENS, strict=True)
    }


def _qwen_frames(processor: str, patch_size: int) -> dict[str, Any]:
    side = 2 * patch_size
    return {
        "video_processor_type": processor,
        "size": {"shortest_edge": 2 * side * side, "longest_edge": 64 * side * side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }


def _save(
    folder: Path,
    model_class: type[PreTrainedModel],
    config: Any,
    tokenizer: PreTrainedTokenizerFast,
    frames: dict[str, Any],
) -> Path:
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(common | frames))
    return folder
