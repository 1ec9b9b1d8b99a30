"""First weights of the long model from the 8-frame model's, and layers appended to a trained model."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from pipeline.embedded.long.scenes import FRAME_SIZE
from pipeline.embedded.training.architecture import build_model


@torch.no_grad()
def warm_start(model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    """Copy what fits from a smaller checkpoint: tower, projector, layers, and the words that both vocabularies have.

    The source's position table, a twelfth as large as what patches look like, hardly says where a patch is: motion of
    a few pixels cannot be learned from it, so `grid_encoding` takes its place. Words that the source does not know
    keep their first weights.
    """
    old = AutoModelForImageTextToText.from_pretrained(source).state_dict()
    words, known = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(source).get_vocab()
    for name, value in model.state_dict().items():
        if name not in old:
            continue
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            common = words.keys() & known.keys()
            value[[words[word] for word in common]] = old[name][[known[word] for word in common]]
        elif name.endswith("position_embedding.weight"):
            value.copy_(grid_encoding(round(len(value) ** 0.5), value.shape[1]))
        else:
            value.copy_(old[name])


def grid_encoding(side: int, width: int) -> torch.Tensor:
    """Sines and cosines (side * side, width) of rows and columns, from half a wave over the grid to waves of two."""
    count = width // 4
    frequencies = torch.pi * torch.logspace(-math.log2(side), 0, count, base=2)
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


@torch.no_grad()
def grown(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, layers: int
) -> LlavaOnevisionForConditionalGeneration:
    """A deeper copy that gives the same outputs: the appended layers add nothing to the residual stream yet."""
    deeper = build_model(tokenizer, seed, frame_size=FRAME_SIZE, layers=layers)
    deeper.load_state_dict(model.state_dict(), strict=False)
    for layer in deeper.model.language_model.layers[model.config.text_config.num_hidden_layers :]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return deeper
