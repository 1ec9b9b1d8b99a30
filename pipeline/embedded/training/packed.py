"""The embedded model's forward pass over packed text: many questions to one clip in a single row.

It runs the layers of the unmodified Hugging Face model, so a packed question gets the logits that it gets alone. What
it adds is dropping random visual tokens at any layer, for training and for the model card's curve.
"""

from __future__ import annotations

import torch
from transformers import LlavaOnevisionForConditionalGeneration

from pipeline.embedded.training.batches import IGNORE, TextRow


def patch_features(model: LlavaOnevisionForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """(clips, frames, 3, H, W) -> (clips * frames, patches, vision width)."""
    output = model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True, return_dict=True)
    return output.hidden_states[model.config.vision_feature_layer]


def visual_tokens(model: LlavaOnevisionForConditionalGeneration, features: torch.Tensor, clips: int) -> torch.Tensor:
    """(clips, frames * 36 + 1, language width): projected and pooled patches and the closing newline."""
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
    """Logits (targets, vocabulary) at every text position that has a target.

    `prefix` (1, n) are the token ids before the video. `keep` maps layers to a share in (0, 1]: before that layer this
    share of the visual tokens left by earlier layers is kept, chosen at random per clip. Position ids do not change.
    """
    language = model.model.language_model
    clips, length = text.ids.shape
    opening = language.embed_tokens(prefix.expand(clips, -1))
    hidden = torch.cat([opening, visual, language.embed_tokens(text.ids)], dim=1)
    lead = hidden.shape[1] - length
    positions = torch.cat([torch.arange(lead).expand(clips, -1), text.positions], dim=1)
    segments = torch.cat([text.segments.new_zeros(clips, lead), text.segments], dim=1)
    mask = rotary = None
    for index, layer in enumerate(language.layers):
        if index in keep:
            last_visual = hidden.shape[1] - length - 1  # the newline, which stays
            order = random_order(clips, prefix.shape[1], last_visual, hidden.shape[1], keep[index])
            hidden = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
            positions, segments, mask = positions.gather(1, order), segments.gather(1, order), None
        if mask is None:
            mask, rotary = visibility(positions, segments), language.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    return model.lm_head(language.norm(hidden[:, -length:][text.targets != IGNORE]))


def random_order(rows: int, start: int, stop: int, length: int, share: float) -> torch.Tensor:
    """Sorted indices (rows, kept): of start..stop a random share, at least one; of the rest of 0..length, all."""
    count = stop - start
    chosen = torch.rand(rows, count).argsort(dim=1)[:, : max(1, round(share * count))].sort(dim=1).values + start
    return torch.cat([torch.arange(start).expand(rows, -1), chosen, torch.arange(stop, length).expand(rows, -1)], dim=1)


def visibility(positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Attention mask (batch, 1, queries, keys): earlier tokens of the video part and of the query's own segment."""
    earlier = positions[:, None, :] <= positions[:, :, None]
    same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    return (earlier & same)[:, None]
