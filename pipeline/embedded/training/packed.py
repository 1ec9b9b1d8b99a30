"""The forward pass of both embedded models over packed text: many questions to one clip in a single row.

It runs the layers of the unmodified Hugging Face model, so a packed question gets the logits that it gets alone. What
it adds is dropping random visual tokens at any layer, for training and for the model cards. The video part attends
causally and needs no mask; only the text, which is short, takes one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, apply_rotary_pos_emb

from pipeline.embedded.training.batches import IGNORE, TextRow


def patch_features(model: LlavaOnevisionForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """(clips, frames, 3, H, W) -> (clips * frames, patches, vision width)."""
    output = model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True, return_dict=True)
    return output.hidden_states[model.config.vision_feature_layer]


def visual_tokens(model: LlavaOnevisionForConditionalGeneration, features: torch.Tensor, clips: int) -> torch.Tensor:
    """(clips, frames * tokens a frame + 1, language width): projected and pooled patches and the closing newline."""
    core = model.model
    pooled = core.apply_pooling(core.multi_modal_projector(features))
    tokens = pooled.reshape(clips, -1, pooled.shape[-1])
    return torch.cat([tokens, core.image_newline.expand(clips, 1, -1)], dim=1)


def answer_logits(
    model: LlavaOnevisionForConditionalGeneration,
    prefix: torch.Tensor,
    visual: torch.Tensor,
    text: TextRow,
    keep: dict[int, float],
) -> torch.Tensor:
    """Logits (targets, vocabulary) at every text position that has a target; arguments as for `layer_outputs`."""
    *_, last = layer_outputs(model, prefix, visual, text, keep)
    return logits_of(model, last, text)


def logits_of(model: LlavaOnevisionForConditionalGeneration, hidden: torch.Tensor, text: TextRow) -> torch.Tensor:
    """The logits (targets, vocabulary) of hidden states (clips, length, width) that end with the text."""
    texts = hidden[:, -text.ids.shape[1] :]
    return model.lm_head(model.model.language_model.norm(texts[text.targets != IGNORE]))


def layer_outputs(
    model: LlavaOnevisionForConditionalGeneration,
    prefix: torch.Tensor,
    visual: torch.Tensor,
    text: TextRow,
    keep: dict[int, float],
) -> Iterator[torch.Tensor]:
    """The hidden states (clips, prefix + visual + text, width) after every layer, before the last norm.

    `prefix` (1, n) are the token ids before the video. `keep` maps layers to a share in [0, 1]: before that layer this
    share of the visual tokens left by earlier layers is kept, chosen at random per clip. Position ids do not change.
    """
    language = model.model.language_model
    clips, length = text.ids.shape
    opening = language.embed_tokens(prefix.expand(clips, -1))
    hidden = torch.cat([opening, visual, language.embed_tokens(text.ids)], dim=1)
    # (clips, lead + length) positions: those of the text restart with every segment
    lead = hidden.shape[1] - length
    positions = torch.cat([torch.arange(lead).expand(clips, -1), text.positions], dim=1)
    mask = rotary = None
    for index, layer in enumerate(language.layers):
        if index in keep:
            newline = lead - 1  # the newline stays
            # (clips, kept) places that stay: prefix, a share of the video, newline and text
            order = random_order(clips, prefix.shape[1], newline, hidden.shape[1], keep[index])
            hidden = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
            positions, lead, mask = positions.gather(1, order), order.shape[1] - length, None
        if mask is None or rotary is None:
            mask, rotary = text_visibility(text.segments, lead), language.rotary_emb(hidden, positions)
        hidden = _layer_forward(layer, hidden, rotary, mask, lead)
        yield hidden


def _layer_forward(
    layer: Qwen2DecoderLayer,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    lead: int,
) -> torch.Tensor:
    """One decoder layer on `lead` tokens of prefix and video and the text after them."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    # (clips, heads, length, head_dim), keys and values repeated to the number of query heads
    query, key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key, value = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in (key, value))
    # The video never sees the text, so its attention is plainly causal: half the work of a mask over everything.
    video = F.scaled_dot_product_attention(query[:, :, :lead], key[:, :, :lead], value[:, :, :lead], is_causal=True)
    text = F.scaled_dot_product_attention(query[:, :, lead:], key, value, attn_mask=mask)
    hidden = hidden + attention.o_proj(torch.cat([video, text], dim=2).transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def random_order(rows: int, start: int, stop: int, length: int, share: float) -> torch.Tensor:
    """Sorted indices (rows, kept): of start..stop a random share, at least one unless it is 0; of the rest, all."""
    count = max(stop - start, 0)
    kept = max(round(share * count), int(share > 0))
    chosen = torch.rand(rows, count).argsort(dim=1)[:, :kept].sort(dim=1).values + start
    return torch.cat([torch.arange(start).expand(rows, -1), chosen, torch.arange(stop, length).expand(rows, -1)], dim=1)


def text_visibility(segments: torch.Tensor, lead: int) -> torch.Tensor:
    """Attention mask (clips, 1, text, lead + text): all of the video part, and earlier tokens of the own segment."""
    clips, length = segments.shape
    same = segments[:, None, :] == segments[:, :, None]
    # (clips, text, text): the same segment and not later
    own = same & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.cat([own.new_ones(clips, length, lead), own], dim=2)[:, None]
