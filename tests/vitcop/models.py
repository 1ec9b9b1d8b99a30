"""A tiny model of each family, built from its config with random weights, and inputs that fit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

PAD, VIDEO, IMAGE, START, END = 0, 1, 2, 3, 4
TEXT_FROM, VOCABULARY = 10, 96
FRAMES = 4
LAYERS = 5

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # large, so that what a random model says depends on what it sees
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.15,
    "initializer_factor": 4.0,
}
TOKENS: dict[str, Any] = {"image_token_index": IMAGE, "video_token_index": VIDEO}
QWEN_VIT: dict[str, Any] = {"num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def clip(side: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(**VIT, image_size=8 * side, patch_size=8)


def llava_onevision() -> PreTrainedModel:
    """7x7 patches pooled to 4x4."""
    vision = SiglipVisionConfig(
        **{name: value for name, value in VIT.items() if not name.startswith("init")},
        image_size=56,
        patch_size=8,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        **TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[56, 56]],
    )
    return LlavaOnevisionForConditionalGeneration(config)


def llava_next_video() -> PreTrainedModel:
    """9x9 patches pooled to 4x4, the last row and column left out."""
    config = LlavaNextVideoConfig(vision_config=clip(9), text_config=LlamaConfig(**TEXT), **TOKENS)
    return LlavaNextVideoForConditionalGeneration(config)


def video_llava() -> PreTrainedModel:
    config = VideoLlavaConfig(vision_config=clip(4), text_config=LlamaConfig(**TEXT), **TOKENS)
    return VideoLlavaForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    config = LlavaConfig(vision_config=clip(8), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def llava_full() -> PreTrainedModel:
    """The CLS token of each picture enters the language model."""
    config = LlavaConfig(
        vision_config=clip(4),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    vision = QWEN_VIT | {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=TEXT | {"rope_parameters": MROPE}, **QWEN_TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> PreTrainedModel:
    """Windows of 2x2 tokens in a grid of 4x5 tokens; the last block sees windows, the one before it everything."""
    vision = QWEN_VIT | {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT | {"rope_parameters": MROPE}, **QWEN_TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    """Deepstack features for the first two layers of the language model."""
    vision = QWEN_VIT | {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = TEXT | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS))


def internvl() -> PreTrainedModel:
    """8x8 patches shuffled into 4x4 tokens; norms on queries and keys as in the largest towers."""
    vision = {name: value for name, value in VIT.items() if name != "initializer_factor"}
    vision |= {"image_size": 64, "patch_size": 8, "use_qk_norm": True}
    config = InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE)
    return InternVLForConditionalGeneration(config)


@dataclass(frozen=True)
class Setup:
    """How to build a family's tiny model, and the shape of its visual input.

    Attributes:
        frames: frames of visual tokens.
        per_frame: visual tokens of a frame.
        pixels: shape of one clip's pixels, and the name under which they are passed.
        grid: (time, height, width) of a clip in patches, for the models that are told.
        between: text tokens between two frames.
        fixed: placeholders that are no visual tokens, at the beginning of every frame and at the end of the clip.
    """

    build: Callable[[], PreTrainedModel]
    frames: int
    per_frame: int
    pixels: tuple[int, ...]
    name: str = "pixel_values_videos"
    grid: tuple[int, int, int] | None = None
    between: int = 0
    fixed: tuple[int, int] = (0, 0)

    @property
    def visual_tokens(self) -> int:
        return self.frames * self.per_frame

    @property
    def counted(self) -> int:
        """Visual tokens that a budget counts: the CLS token of a frame is one of them, a newline is text."""
        return self.frames * (self.per_frame + self.fixed[0])

    @property
    def token(self) -> int:
        return VIDEO if self.name == "pixel_values_videos" else IMAGE


SETUPS: dict[str, Setup] = {
    "llava_onevision": Setup(llava_onevision, FRAMES, 16, (FRAMES, 3, 56, 56), fixed=(0, 1)),
    "llava_next_video": Setup(llava_next_video, FRAMES, 16, (FRAMES, 3, 72, 72)),
    "video_llava": Setup(video_llava, FRAMES, 16, (FRAMES, 3, 32, 32), fixed=(1, 0)),
    "llava": Setup(llava, 1, 64, (3, 64, 64), name="pixel_values"),
    "qwen2_vl": Setup(qwen2_vl, FRAMES, 12, (FRAMES * 6 * 8, 96), grid=(FRAMES, 6, 8)),
    "qwen2_5_vl": Setup(qwen2_5_vl, FRAMES, 20, (FRAMES * 8 * 10, 96), grid=(FRAMES, 8, 10)),
    "qwen3_vl": Setup(qwen3_vl, FRAMES, 12, (FRAMES * 6 * 8, 96), grid=(FRAMES, 6, 8), between=3),
    "internvl": Setup(internvl, FRAMES, 16, (FRAMES, 3, 64, 64), name="pixel_values", between=3),
}


VARIANTS: dict[str, Setup] = {
    "llava_full": Setup(llava_full, 3, 16, (3, 3, 32, 32), name="pixel_values", fixed=(1, 0)),
}
"""Further settings of the families."""
ALL_SETUPS = SETUPS | VARIANTS


def build(family: str, attention: str = "sdpa") -> PreTrainedModel:
    """The family's tiny model; the same weights every time."""
    torch.manual_seed(7)
    model = ALL_SETUPS[family].build().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # as after training: neither all zero nor all one
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    model.set_attn_implementation(attention)
    return model


def clip_tokens(setup: Setup) -> list[int]:
    """What a prompt holds for one clip."""
    frame = [setup.token] * (setup.fixed[0] + setup.per_frame)
    frame = [START, *frame, END] if setup.between else frame
    tokens = list(frame)
    for number in range(1, setup.frames):
        tokens += [TEXT_FROM + number] * setup.between + frame
    return tokens + [setup.token] * setup.fixed[1]


def make_inputs(family: str, texts: Sequence[int] = (5,), seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a batch whose prompts end in `texts` tokens of text, left-padded to equal length."""
    setup = ALL_SETUPS[family]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in texts:
        before, after = (torch.randint(TEXT_FROM, VOCABULARY, (size,), generator=generator) for size in (3, length))
        rows.append(torch.cat((before, torch.tensor(clip_tokens(setup)), after)))
    longest = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    pixels = torch.randn(len(texts), *setup.pixels, generator=generator)
    if setup.grid or (setup.name == "pixel_values" and setup.frames > 1):
        pixels = pixels.flatten(0, 1)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), setup.name: pixels}
    if setup.grid:
        inputs["video_grid_thw"] = torch.tensor([setup.grid] * len(texts))
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2
    return inputs


def take_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    rows = len(inputs["input_ids"])
    padding = int((inputs["attention_mask"][row] == 0).sum())
    single = {}
    for name, value in inputs.items():
        part = value.unflatten(0, (rows, -1))[row]
        single[name] = part[:, padding:] if value.shape == inputs["input_ids"].shape else part
    return single
