"""The inputs of the model's forward: finding the visual ones, checking them, and handing the rest on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from vitcop.errors import UnsupportedInputError
from vitcop.families import Family, Inputs
from vitcop.language import KVCache, TextConfig
from vitcop.selection import true_indices

Kwargs = dict[str, Any]
Args = tuple[Any, ...]
Call = tuple[Args, Kwargs]
"""The arguments of a forward, by place and by name, as hooks get and return them."""

PRUNED = ("input_ids", "pixel_values", "image_", "video_", "mm_", "second_per_grid", "image_sizes")
"""Beginnings of the names of inputs that become embeddings, so that the language model does not get them."""


class Deferred(dict[str, Any]):
    """What travels through `generate` as `mm_encoder_outputs` up to the first forward: the pixels, which it would
    otherwise encode before the model is called ("visual"), and the length of the whole conversation ("length").
    """

    def items(self) -> Any:
        """Asked for only where `generate` cuts the prompt and its features into chunks.

        Raises:
            UnsupportedInputError: always.
        """
        raise UnsupportedInputError("a prompt can't be pruned in chunks; leave out prefill_chunk_size")

    def __deepcopy__(self, memo: Mapping[int, object]) -> Deferred:
        return Deferred(self)  # for an assistant model; it needs no pixels of its own


def forward_inputs(signature: inspect.Signature, args: Args, kwargs: Kwargs) -> Kwargs:
    """The arguments of a forward by name, those of its `**kwargs` among them."""
    inputs: Kwargs = dict(signature.bind_partial(*args, **kwargs).arguments)
    more: Kwargs = inputs.pop("kwargs", {})
    return inputs | more


def text_inputs(inputs: Inputs) -> Kwargs:
    """The forward inputs that are neither ids nor anything visual."""
    return {name: value for name, value in inputs.items() if not name.startswith(PRUNED)}


def check_mask(mask: object) -> None:
    """Raise UnsupportedInputError unless an attention mask is None or a tensor (B, S)."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedInputError(f"attention_mask must be a tensor (batch, tokens), got {got}")


def holds(condition: Tensor) -> bool:
    """The value of a condition on the caller's inputs; True on the meta device, which has no values.

    On a GPU this waits for what is queued. A prefill asks once, before the vision tower has been given any work.
    """
    return condition.is_meta or bool(condition)


def placeholder_places(family: Family, ids: Tensor, count: int) -> Tensor:
    """(B, count) positions of a clip's placeholders in prompts (B, S).

    Raises:
        UnsupportedInputError: a prompt has another number of them.
    """
    mask = family.placeholders(ids)
    if not holds((mask.sum(dim=1) == count).all()):
        raise UnsupportedInputError(
            f"every prompt of the batch must hold {count} visual placeholder tokens, one video of equal length each; "
            "put other lengths into other batches"
        )
    return true_indices(mask, count)


def hidden_states(args: Args, kwargs: Kwargs) -> Tensor:
    """(B, S, D) the input of a decoder layer."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden_states(hidden: Tensor, args: Args, kwargs: Kwargs) -> Call:
    """The arguments of a decoder layer with another input (B, S, D)."""
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def stage_mask(
    config: TextConfig,
    hidden: Tensor,
    valid: Tensor | None,
    cache: KVCache,
    layer: int,
    bias: Tensor | None = None,
) -> Any:
    """The mask that the model's attention implementation takes, for the tokens that this layer's cache holds.

    Args:
        hidden: (B, S, D) the new tokens.
        valid: (B, cached + S) bool or None, False at padding.
        bias: (B, cached + S) or None, added to the logits of these tokens (sdpa and eager attention).
    """
    if bias is not None:
        return _additive_mask(hidden, valid, bias)
    return create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=valid, past_key_values=cache, layer_idx=layer
    )


def _additive_mask(hidden: Tensor, valid: Tensor | None, bias: Tensor) -> Tensor:
    """(B, 1, S, cached + S) causal mask with a bias, in the dtype of the new tokens (B, S, D)."""
    new, length = hidden.shape[1], bias.shape[1]
    # (S, cached + S) causal: new token i stands at place length - S + i and sees no later one
    place = torch.arange(length, device=hidden.device)
    seen = place <= place[length - new :, None]
    # (1 or B, S, cached + S)
    seen = seen[None] if valid is None else seen & valid[:, None]
    # The least finite number, so that the rows of padding, which see nothing, have no NaN.
    return torch.where(seen, bias[:, None], torch.finfo(hidden.dtype).min).to(hidden.dtype)[:, None]
