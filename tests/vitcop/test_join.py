"""Rows of several clips in one cache decode as they do alone, in any order and mix."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from tests.vitcop.models import SETUPS, TEXT_FROM, VIDEO, VOCABULARY, build, clip_tokens
from vitcop import Method, UnsupportedInputError, ViTCoP, get_method, join, mask_of_new_tokens, prune, select
from vitcop.cache import layout_of

METHODS: tuple[Method, ...] = (
    ViTCoP(retention_ratio=0.3),
    ViTCoP(retention_ratio=0.8),
    get_method("random")(retention_ratio=0.4),
    get_method("vitcop_video")(retention_ratio=0.3, bias=1),
    get_method("kmeans")(retention_ratio=0.5, bias=0.5),
    get_method("fastv")(retention_ratio=0.6),
    get_method("none")(retention_ratio=1.0),
)


def make_clip(family: str, frames: int, text: int, seed: int) -> dict[str, Tensor]:
    """Inputs of one prompt: `frames` frames and `text` tokens behind them."""
    setup, generator = SETUPS[family], torch.Generator().manual_seed(seed)
    frames = frames if setup.frames > 1 else 1
    setup = dataclasses.replace(setup, frames=frames)
    before, after = (torch.randint(TEXT_FROM, VOCABULARY, (size,), generator=generator) for size in (3, text))
    ids = torch.cat((before, torch.tensor(clip_tokens(setup)), after))[None]
    per_frame = setup.pixels[0] // SETUPS[family].frames
    pixels = torch.randn(
        per_frame * frames if setup.frames > 1 else setup.pixels[0], *setup.pixels[1:], generator=generator
    )
    flat = setup.grid or (setup.name == "pixel_values" and setup.frames > 1)
    inputs = {"input_ids": ids, setup.name: pixels if flat else pixels[None]}
    if setup.grid:
        inputs["video_grid_thw"] = torch.tensor([[frames, *setup.grid[1:]]])
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2
    return inputs


def decode(model: PreTrainedModel, cache: DynamicCache, logits: Tensor, steps: int) -> Tensor:
    """(B, steps) greedy tokens."""
    chosen = [logits.argmax(-1, keepdim=True)]
    for _ in range(steps - 1):
        logits = model(input_ids=chosen[-1], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        chosen.append(logits.argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1)


def prefill(model: PreTrainedModel, method: Method, inputs: dict[str, Tensor]) -> tuple[DynamicCache, Tensor]:
    with prune(model, method):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits[:, -1]


@pytest.mark.parametrize("seed", range(2))
def test_joined_rows_decode_as_they_do_alone(family: str, seed: int) -> None:
    """Different frame counts, text lengths and methods, hence stages of different lengths at different layers."""
    model, order = build(family), random.Random(seed)
    rows = []
    for number in range(6):
        inputs = make_clip(family, order.choice((2, 4, 6)), order.choice((1, 4, 9)), seed=10 * seed + number)
        method = order.choice(METHODS)
        cache, logits = prefill(model, method, inputs)
        with prune(model, METHODS[0]):
            alone = decode(model, *prefill_copy(cache, logits), steps=7)
        rows.append((cache, logits, alone))
    order.shuffle(rows)
    caches, logits, alone = zip(*rows, strict=True)
    with prune(model, METHODS[0]):
        together = decode(model, join(caches), torch.cat(logits), steps=7)
    assert torch.equal(together, torch.cat(alone))


def prefill_copy(cache: DynamicCache, logits: Tensor) -> tuple[DynamicCache, Tensor]:
    return select(cache, [0]), logits


def test_rows_leave_and_join_between_steps(family: str) -> None:
    model, method = build(family), METHODS[0]
    with prune(model, method):
        made = [model(**make_clip(family, 2 + 2 * (n % 2), 2 + n, seed=n), logits_to_keep=1) for n in range(4)]
        alone = [decode(model, select(m.past_key_values, [0]), m.logits[:, -1], steps=8) for m in made]
        # Rows 0 and 1 start together; 2 joins after two steps, row 1 leaves after four, 3 joins then.
        cache = join([made[0].past_key_values, made[1].past_key_values])
        chosen = {number: made[number].logits[0, -1].argmax().item() for number in range(4)}
        told: dict[int, list[int]] = {number: [int(chosen[number])] for number in range(4)}
        active = [0, 1]
        for step in range(6):
            if step == 2:
                cache, active = join([cache, made[2].past_key_values]), [*active, 2]
            if step == 4:
                gone = active.index(1)
                cache = select(cache, [place for place in range(len(active)) if place != gone])
                active = [number for number in active if number != 1]
                cache, active = join([cache, made[3].past_key_values]), [*active, 3]
            last = torch.tensor([[told[number][-1]] for number in active])
            logits = model(input_ids=last, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            for number, token in zip(active, logits.argmax(-1).tolist(), strict=True):
                told[number].append(token)
    for number, tokens in told.items():
        assert tokens == alone[number][0, : len(tokens)].tolist(), number
    assert [len(told[number]) for number in range(4)] == [7, 5, 5, 3]


def test_questions_of_different_lengths_go_on_from_joined_clips(family: str) -> None:
    model, method = build(family), METHODS[0]
    generator = torch.Generator().manual_seed(3)
    questions = [torch.randint(TEXT_FROM, VOCABULARY, (size,), generator=generator) for size in (5, 1, 3)]
    clips = [0, 1, 0]
    with prune(model, method):
        caches = [model(**make_clip(family, 2 + 2 * n, 1, seed=n), logits_to_keep=1).past_key_values for n in range(2)]
        alone = []
        for clip, question in zip(clips, questions, strict=True):
            cache = select(caches[clip], [0])
            output = model(input_ids=question[None], past_key_values=cache, logits_to_keep=1)
            alone.append((output.logits[:, -1], decode(model, cache, output.logits[:, -1], steps=4)))
        joint = join([select(caches[clip], [0]) for clip in clips])
        longest = max(map(len, questions))
        ids = torch.stack([pad(question, (longest - len(question), 0)) for question in questions])
        valid = torch.stack([torch.arange(longest) >= longest - len(question) for question in questions])
        mask = mask_of_new_tokens(joint, valid)
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=joint, logits_to_keep=1).logits[:, -1]
        together = decode(model, joint, logits, steps=4)
    assert torch.allclose(logits, torch.cat([each for each, _ in alone]), atol=1e-4)
    assert torch.equal(together, torch.cat([each for _, each in alone]))


def test_a_batch_shrinks_when_its_longest_row_leaves() -> None:
    model = build("llava_onevision")
    caches = [prefill(model, METHODS[0], make_clip("llava_onevision", frames, 3, seed=frames))[0] for frames in (2, 6)]
    joint = join(caches)
    assert layout_of(joint).per_layer == layout_of(caches[1]).per_layer  # type: ignore[union-attr]
    short = select(joint, [0])
    assert layout_of(short).per_layer == layout_of(caches[0]).per_layer  # type: ignore[union-attr]
    for layer, original in zip(short.layers, caches[0].layers, strict=True):
        assert torch.equal(layer.keys, original.keys) and torch.equal(layer.values, original.values)


def test_what_is_joined_or_selected_is_left_as_it_was() -> None:
    model = build("llava_onevision")
    with prune(model, METHODS[0]):
        caches = [model(**make_clip("llava_onevision", 4, n, seed=n)).past_key_values for n in (2, 5)]
        before = [layout_of(cache).per_layer for cache in caches]  # type: ignore[union-attr]
        joint = join(caches)
        decode(model, joint, torch.zeros(2, VOCABULARY), steps=3)
        decode(model, select(caches[0], [0, 0]), torch.zeros(2, VOCABULARY), steps=3)
    assert [layout_of(cache).per_layer for cache in caches] == before  # type: ignore[union-attr]
    assert [cache.get_seq_length() for cache in caches] == [lengths[0] for lengths in before]


def test_wrong_caches_and_rows_are_refused() -> None:
    model = build("llava_onevision")
    cache, _ = prefill(model, METHODS[0], make_clip("llava_onevision", 4, 2, seed=0))
    plain = model(input_ids=torch.tensor([[TEXT_FROM]]), use_cache=True).past_key_values
    other = build("qwen3_vl")
    wide, _ = prefill(other.double(), METHODS[0], make_clip("qwen3_vl", 4, 2, seed=0))
    with pytest.raises(UnsupportedInputError, match="no cache to join"):
        join([])
    with pytest.raises(UnsupportedInputError, match="inside prune"):
        join([cache, plain])
    with pytest.raises(UnsupportedInputError, match="different models"):
        join([cache, wide])
    for rows in ([], [1], [-1]):
        with pytest.raises(IndexError, match="from 0 to 0"):
            select(cache, rows)
