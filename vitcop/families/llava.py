"""LLaVA-1.5: CLIP tower, 24x24 tokens, Llama language model; the paper's own setting."""

from __future__ import annotations

from typing import ClassVar

from vitcop.families.frame_tower import PictureTower


class Llava(PictureTower):
    """Picture inputs of `LlavaForConditionalGeneration`; several pictures in a prompt are pruned like frames."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    label: ClassVar[str] = "LLaVA-1.5"
