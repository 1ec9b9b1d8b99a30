"""`generate` on pruned models: every way to decode, several turns, and copies of a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.vitcop.models import SETUPS, TEXT_FROM, VIDEO, VOCABULARY, build, make_inputs, take_row
from tests.vitcop.runs import FEW, METHOD, generate, greedy_by_hand, next_logits
from vitcop import UnsupportedInputError, ViTCoP, prune

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "sequences": {"num_return_sequences": 2, "do_sample": True},
}


# -- ways to decode


@pytest.mark.parametrize("way", WAYS)
def test_keep_all_generates_what_the_model_generates(family: str, way: str) -> None:
    model, inputs = build(family), make_inputs(family, (5, 2))
    before = generate(model, inputs, **WAYS[way])
    with prune(model, ViTCoP(retention_ratio=1.0)) as stats:
        inside = generate(model, inputs, **WAYS[way])
    assert torch.equal(inside, before)
    assert torch.equal(generate(model, inputs, **WAYS[way]), before)
    assert stats.last.retention == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_the_same_after_generating_pruned(family: str, way: str) -> None:
    model, inputs = build(family), make_inputs(family, (5, 2))
    before = generate(model, inputs, **WAYS[way])
    with prune(model, METHOD) as stats:
        first, second = (generate(model, inputs, **WAYS[way]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(generate(model, inputs, **WAYS[way]), before)
    assert stats.last.batch == 2 * max(WAYS[way].get(name, 1) for name in ("num_beams", "num_return_sequences"))


def test_greedy_equals_forwards_by_hand(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, METHOD):
        by_hand, cache = greedy_by_hand(model, inputs, 12)
        output = generate(model, inputs, 12, do_sample=False)
    assert torch.equal(output, by_hand)
    assert len(set(output[0].tolist())) > 1
    assert len({layer.keys.shape[2] for layer in cache.layers}) == 3


def test_a_batch_generates_what_its_rows_generate(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (6, 3, 1))
    with prune(model, METHOD):
        together = generate(model, inputs, 8, do_sample=False)
        singles = [generate(model, take_row(inputs, row), 8, do_sample=False) for row in range(3)]
    assert torch.equal(together, torch.cat(singles))


@pytest.mark.parametrize("family", FEW)
def test_256_tokens(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, METHOD) as stats:
        by_hand, _ = greedy_by_hand(model, inputs, 256)
        result = model.generate(
            **inputs, max_new_tokens=256, min_new_tokens=256, do_sample=False, return_dict_in_generate=True
        )
    assert torch.equal(result.sequences[:, inputs["input_ids"].shape[1] :], by_hand)
    lengths = [layer.keys.shape[2] for layer in result.past_key_values.layers]
    assert lengths == [stats.last.prompt_tokens + kept + 255 for kept in stats.last.kept_per_layer]


def test_sampling_from_one_candidate_is_greedy(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (4, 2))
    with prune(model, METHOD):
        sampled = generate(model, inputs, do_sample=True, top_k=1)
        assert torch.equal(sampled, generate(model, inputs, do_sample=False))


def test_returned_sequences_are_samples_of_their_own_prompt(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (4, 2))
    with prune(model, METHOD):
        several = generate(model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
        once = generate(model, inputs, do_sample=False)
    assert torch.equal(several, once.repeat_interleave(3, dim=0))


def log_probabilities(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """(vocabulary,) of the token after the prompt and `tokens`, computed from scratch."""
    plain = {name: value for name, value in inputs.items() if name != "attention_mask"}
    output = model(**plain, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1]
    if tokens:
        logits = next_logits(model, torch.tensor([tokens]), output.past_key_values)
    return logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("texts", [(5,), (5, 2)], ids=["batch1", "batch2"])
def test_beam_search_equals_beams_by_hand(family: str, texts: tuple[int, ...]) -> None:
    model, inputs, length = build(family), make_inputs(family, texts), 4
    with prune(model, METHOD):
        result = model.generate(
            **inputs,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            max_new_tokens=length,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for row in range(len(texts)):
            single = take_row(inputs, row)
            beams: list[tuple[float, list[int]]] = [(0.0, [])]
            for _ in range(length):
                grown = [
                    (score + float(step[token]), [*tokens, token])
                    for score, tokens in beams
                    for step in [log_probabilities(model, single, tokens)]
                    for token in step.topk(3).indices.tolist()
                ]
                beams = sorted(grown, reverse=True)[:3]
            sequences = result.sequences[3 * row : 3 * row + 3, inputs["input_ids"].shape[1] :]
            scores = result.sequences_scores[3 * row : 3 * row + 3]
            assert sequences.tolist() == [tokens for _, tokens in beams]
            torch.testing.assert_close(scores, torch.tensor([score / length for score, _ in beams]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("texts", [(5,), (5, 2)], ids=["batch1", "batch2"])
def test_without_a_cache(family: str, texts: tuple[int, ...]) -> None:
    """Every step prefills anew; what it keeps does not depend on the text."""
    model, inputs = build(family), make_inputs(family, texts)
    with prune(model, METHOD) as stats:
        settings = {"do_sample": False, "suppress_tokens": list(range(TEXT_FROM))}  # says no placeholders
        expected = generate(model, inputs, 4, **settings)
        count = len(stats.records)
        assert torch.equal(generate(model, inputs, 4, **settings, use_cache=False), expected)
        assert len(stats.records) == count + 4
        plain = {name: value for name, value in inputs.items() if name != "attention_mask"}
        assert model(**plain, use_cache=False).past_key_values is None


# -- drafts, which a cache must be able to take back


@pytest.mark.parametrize("family", SETUPS)
@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
def test_assisted_decoding_is_greedy(family: str, drafts: str) -> None:
    model, inputs = build(family), make_inputs(family, (9,))
    settings = {"prompt_lookup_num_tokens": 3} if drafts == "prompt lookup" else {"assistant_model": build(family)}
    with prune(model, METHOD) as stats:
        expected = generate(model, inputs, 16, do_sample=False)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False, **settings)
    assert torch.equal(output[:, inputs["input_ids"].shape[1] :], expected)
    assert len(stats.records) == 2


def test_prefill_in_chunks_is_refused(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, METHOD), pytest.raises(UnsupportedInputError, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=3, prefill_chunk_size=8)


def test_placeholder_tokens_in_an_answer_are_text() -> None:
    """A model may say a placeholder token; fed back, it is embedded like any other."""
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        logits = next_logits(model, torch.tensor([[VIDEO, 20]]), cache)
    assert logits.shape == (1, VOCABULARY)
