"""A clip on the model's device, and what its prompts have in common: the pass over the video."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pipeline.model.frames.base import Inputs
from pipeline.model.load import LoadedModel
from pipeline.model.prompt import Prompt
from pipeline.video import DecodedVideo
from vitcop import PrefillRecord, family_of, join, mask_of_new_tokens, record_of, select

ModelInputs = Mapping[str, Any]


class ReadPrompts(NamedTuple):
    """Prompts that the model has read.

    Attributes:
        cache: one row for each prompt.
        logits: (R, vocabulary) after the last token of each.
    """

    cache: DynamicCache
    logits: Tensor


def model_inputs(loaded: LoadedModel, video: DecodedVideo) -> Inputs:
    """The video's frames as the model takes them, on its device."""
    frames = torch.from_numpy(video.frames).to(loaded.device)
    return loaded.frame_processor.to_model_inputs(frames, video.times, loaded.dtype)


class ClipPrefix:
    """A clip inside the pruning context, with the caches of the beginnings of its prompts, the video included.

    Args:
        share: whether prompts may go on from one pass over the video; not when the method looks at the question.
        pixels: what `model_inputs` made of the video, where several methods share it.

    Attributes:
        record: what the last pass over the video kept and cost; None before there was one.
    """

    def __init__(
        self, loaded: LoadedModel, video: DecodedVideo, *, share: bool, pixels: ModelInputs | None = None
    ) -> None:
        self.model, self.share = loaded.model, share
        self.inputs = model_inputs(loaded, video) if pixels is None else pixels
        self.placeholders = loaded.frame_processor.placeholders(dict(self.inputs), video.times)
        self.record: PrefillRecord | None = None
        self._family = family_of(loaded.model)
        # Newer families with M-RoPE ask for token types; others refuse the argument.
        self._takes_types = "mm_token_type_ids" in inspect.signature(loaded.model.forward).parameters
        # token ids of a prompt's beginning -> its cache, one row
        self._caches: dict[tuple[int, ...], DynamicCache] = {}

    def read(self, prompt: Prompt) -> None:
        """Make the pass over the video that this prompt goes on from, if that is still to be done."""
        ids = prompt.ids[: prompt.prefix_length]
        if self.share and ids not in self._caches:
            # A clip whose prompts begin differently, by a system text of their own, has several passes.
            self._caches[ids] = self._pass(ids).cache

    def prefix(self, prompt: Prompt) -> DynamicCache:
        """The cache of the prompt's beginning, one row; `read` has made it."""
        return self._caches[prompt.ids[: prompt.prefix_length]]

    def read_whole(self, prompt: Prompt) -> ReadPrompts:
        """A prompt read by itself, for methods that look at the question."""
        return self._pass(prompt.ids)

    def _pass(self, ids: Sequence[int]) -> ReadPrompts:
        output = self.model(**self._visual_inputs(ids), use_cache=True, logits_to_keep=1)
        self.record = record_of(output.past_key_values)
        return ReadPrompts(output.past_key_values, output.logits[:, -1])

    def _visual_inputs(self, ids: Sequence[int]) -> Inputs:
        inputs = {"input_ids": torch.tensor([ids], device=self.model.device), **self.inputs}
        if self._takes_types:  # from these the families with M-RoPE know what is text (0) and what is video (2)
            inputs["mm_token_type_ids"] = 2 * self._family.placeholders(inputs["input_ids"]).int()
        return inputs


def read_prompts(prompts: Sequence[tuple[ClipPrefix, Prompt]]) -> ReadPrompts:
    """Prompts of any clips, read together: one forward over what follows the video in each.

    Args:
        prompts: R prompts, each with its clip, whose pass over the video is done where it can be shared.
    """
    model = prompts[0][0].model
    if not prompts[0][0].share:
        parts = [clip.read_whole(prompt) for clip, prompt in prompts]
        return ReadPrompts(join([part.cache for part in parts]), torch.cat([part.logits for part in parts]))
    # R rows; each clip's prefix is copied for every question on it, so that its own stays for later ones.
    cache = join([select(clip.prefix(prompt), [0]) for clip, prompt in prompts])
    rest = [prompt.ids[prompt.prefix_length :] for _, prompt in prompts]
    longest = max(map(len, rest))
    # (R, longest) what follows the video, filled up on the left so that all prompts end in the last column
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rest], device=model.device)
    # (R,) columns of filling, and (R, longest) True at tokens
    filling = torch.tensor([longest - len(row) for row in rest], device=model.device)
    valid = torch.arange(longest, device=model.device) >= filling[:, None]
    mask = None if min(map(len, rest)) == longest else mask_of_new_tokens(cache, valid)
    output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return ReadPrompts(cache, output.logits[:, -1])


def log_likelihoods(model: nn.Module, read: ReadPrompts, answers: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
    """Log-probability of each of the answers to each prompt, in one forward over all of them.

    Args:
        read: R prompts.
        answers: for each prompt the token ids of its answers; one at least.

    Returns:
        For each prompt a tensor (its answers,), float32.
    """
    flat = [list(answer) for each in answers for answer in each]
    # (A,) number of the prompt of each answer, A answers in all
    rows = [number for number, each in enumerate(answers) for _ in each]
    longest = max(map(len, flat))
    device = read.logits.device
    # (A, longest) tokens of each answer, filled up on the right, where no token that counts can see the filling
    targets = torch.tensor([answer + [-1] * (longest - len(answer)) for answer in flat], device=device)
    logits = read.logits[torch.tensor(rows, device=device)][:, None]  # (A, 1, vocabulary) of the first tokens
    if longest > 1:
        cache = select(read.cache, rows)
        # The logits after token i score token i + 1, so the last token of an answer is not read.
        later = model(input_ids=targets[:, :-1].clamp(min=0), past_key_values=cache, use_cache=True).logits
        logits = torch.cat((logits, later), dim=1)  # (A, longest, vocabulary)
    # (A, longest) log-probability of each token of each answer
    chosen = logits.float().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
    # Filling adds 0, so rows of different lengths sum up over their own tokens.
    return list(chosen.masked_fill(targets < 0, 0).sum(dim=1).split([len(each) for each in answers]))
