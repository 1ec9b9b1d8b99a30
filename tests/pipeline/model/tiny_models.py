"""Checkpoint folders around the tiny models of tests/vitcop: weights, byte-level tokenizer, chat template, frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.vitcop.models import SETUPS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TURN_TEMPLATE = (
    "{{%- for message in messages -%}}"
    "{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{%- for part in message['content'] if part['type'] == 'video' -%}}{{{{ '{video}' }}}}{{%- endfor -%}}"
    "{{%- for part in message['content'] if part['type'] == 'text' -%}}{{{{ part['text'] }}}}{{%- endfor -%}}"
    "{{{{ '<|im_end|>\n' }}}}"
    "{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ '<|im_start|>assistant\n' }}}}{{%- endif -%}}"
)
LLAVA_TOKENS = {"image_token_id": "<image>", "video_token_id": "<video>"}
INTERNVL_TOKENS = {"image_token_id": "<IMG_CONTEXT>"}
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def _square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def _cropped(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": {"height": side, "width": side}}


def _patched(least: int, most: int) -> dict[str, Any]:
    bounds = {"shortest_edge": least, "longest_edge": most}
    return {"size": bounds, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


FRAMES: dict[str, dict[str, Any]] = {
    "llava_onevision": _square(56),
    "llava_next_video": _cropped(72),
    "video_llava": _cropped(32),
    "internvl": _square(64),
    "qwen2_vl": _patched(16 * 16, 32 * 32),
    "qwen2_5_vl": _patched(16 * 16, 32 * 32),
    "qwen3_vl": _patched(16 * 16, 8 * 32 * 32),
}
"""The video processor's settings of each family."""


def save_checkpoint(family: str, folder: Path) -> Path:
    """Write a family's tiny checkpoint; the same one every time."""
    qwen = family.startswith("qwen")
    named = QWEN_TOKENS if qwen else INTERNVL_TOKENS if family == "internvl" else LLAVA_TOKENS
    tokenizer = build_tokenizer(QWEN_VIDEO if qwen else "<video>\n", (*named.values(), "<video>", "<img>", "</img>"))
    _with_vocabulary(SETUPS[family].build(), tokenizer, named).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    scale = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    settings = common | scale | FRAMES[family]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def build_tokenizer(video: str, tokens: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones; `video` is what the chat template writes for a video."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END, *tokens)])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = TURN_TEMPLATE.format(video=video)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, chat_template=template)


def _with_vocabulary(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, named: dict[str, str]
) -> PreTrainedModel:
    """The same architecture with new weights, for the tokenizer's ids."""
    config = network.config
    config.text_config.vocab_size = len(tokenizer)
    for name, token in named.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    remade = type(network)(config)
    remade.generation_config.eos_token_id = tokenizer.eos_token_id
    remade.generation_config.pad_token_id = tokenizer.pad_token_id
    return remade
