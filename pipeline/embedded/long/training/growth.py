"""First weights of the long model from the 8-frame model's, and layers appended to a trained model."""

from __future__ import annotations

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

    Of the position table, which has a row for each place of a square grid, the top left part is taken. Words that
    the source does not know keep their first weights.
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
            side, old_side = (round(len(table) ** 0.5) for table in (value, old[name]))
            value.copy_(old[name].unflatten(0, (old_side, old_side))[:side, :side].flatten(0, 1))
        else:
            value.copy_(old[name])


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
