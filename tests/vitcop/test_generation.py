"""`generate` on pruned models: every way to decode, several turns, and copies of a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tests.vitcop.models import PAD, SETUPS, TEXT_FROM, VIDEO, VOCABULARY, build, make_inputs, take_row
from vitcop import UnsupportedInputError, ViTCoP, get_method, prune

METHOD = ViTCoP(retention_ratio=0.3)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "sequences": {"num_return_sequences": 2, "do_sample": True},
}
FEW = ["llava_onevision", "qwen2_5_vl", "qwen3_vl"]


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int = 6, **settings: Any) -> Tensor:
    """The new tokens (rows, tokens); the same random numbers every time."""
    torch.manual_seed(11)
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
    return output[:, inputs["input_ids"].shape[1] :]


def next_logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (B, vocabulary) after `ids` (B, n), which follow what the cache holds; positions are left to the cache."""
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def greedy_by_hand(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, DynamicCache]:
    """Greedy decoding by forwards of one token, of unpadded prompts."""
    plain = {name: value for name, value in inputs.items() if name != "attention_mask"}
    output = model(**plain, use_cache=True, logits_to_keep=1)
    cache, chosen = output.past_key_values, [output.logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(tokens - 1):
        chosen.append(next_logits(model, chosen[-1], cache).argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1), cache


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


@pytest.mark.parametrize("family", FEW)
def test_a_cache_can_lose_its_question(family: str) -> None:
    """Text after the video can be taken back, and another question asked."""
    model, inputs = build(family), make_inputs(family, (6,))
    del inputs["attention_mask"]
    question = torch.randint(TEXT_FROM, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(5))
    other = inputs | {"input_ids": torch.cat((inputs["input_ids"][:, :-6], question), dim=1)}
    if "mm_token_type_ids" in inputs:
        other["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :-2]
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        next_logits(model, torch.tensor([[20, 21, 22]]), cache)
        cache.crop(-9)
        again = next_logits(model, question, cache)
        expected = model(**other, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [METHOD, get_method("fastv")(retention_ratio=0.6)])
def test_a_cache_can_not_lose_what_tokens_were_chosen_by(method: Any) -> None:
    """The video itself, or, where the question chose the tokens, the question."""
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision", (6,))
    lost = 2 if method.query_aware else 7
    with prune(model, method):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-lost)
        with pytest.raises(UnsupportedInputError, match="changed from outside"):
            next_logits(model, torch.tensor([[20]]), cache)


def test_a_cache_cut_in_one_layer_is_refused() -> None:
    model, inputs = build("llava"), make_inputs("llava", (6,))
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.layers[1].crop(-1)
        with pytest.raises(UnsupportedInputError, match="changed from outside"):
            next_logits(model, torch.tensor([[20]]), cache)


# -- caches and ways that can't work


@pytest.mark.parametrize("implementation", ["static", "offloaded", "offloaded_static"])
def test_caches_of_one_length_are_refused(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Stream", lambda *args: None, raising=False)  # offloading makes one at once
    model, inputs = build(family), make_inputs(family)
    with prune(model, METHOD), pytest.raises(UnsupportedInputError, match="layers of different lengths"):
        model.generate(**inputs, max_new_tokens=3, cache_implementation=implementation)


def test_quantised_caches_are_refused() -> None:
    class Quantised(DynamicLayer):
        """Stands for the layers of `QuantizedCache`, whose back ends are packages of their own."""

    model, inputs = build("llava"), make_inputs("llava")
    cache = Cache(layers=[Quantised() for _ in model.model.language_model.layers])
    with prune(model, METHOD), pytest.raises(UnsupportedInputError, match="layers of different lengths"):
        model(**inputs, past_key_values=cache)


def test_prefill_in_chunks_is_refused(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, METHOD), pytest.raises(UnsupportedInputError, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=3, prefill_chunk_size=8)


# -- several turns


def second_turn(inputs: dict[str, Tensor], answer: Tensor, question: Tensor) -> dict[str, Tensor]:
    """The whole conversation, as a chat template would give it, without the pixels."""
    ids = torch.cat((inputs["input_ids"], answer, question), dim=1)
    more = (0, ids.shape[1] - inputs["input_ids"].shape[1])
    turn = {"input_ids": ids, "attention_mask": functional.pad(inputs["attention_mask"], more, value=1)}
    if "mm_token_type_ids" in inputs:
        turn["mm_token_type_ids"] = functional.pad(inputs["mm_token_type_ids"], more)
    return turn


def questions(rows: int, length: int = 3) -> Tensor:
    return torch.randint(TEXT_FROM, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(9))


def converse(model: PreTrainedModel, inputs: dict[str, Tensor], turns: int) -> tuple[list[Tensor], Cache]:
    """Greedy answers to several questions on one cache."""
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    result = model.generate(**inputs, **settings)
    answers = [result.sequences[:, inputs["input_ids"].shape[1] :]]
    for turn in range(1, turns):
        inputs = second_turn(inputs, answers[-1], questions(len(answers[-1]), turn + 1))
        result = model.generate(**inputs, past_key_values=result.past_key_values, **settings)
        answers.append(result.sequences[:, inputs["input_ids"].shape[1] :])
    return answers, result.past_key_values


@pytest.mark.parametrize("texts", [(5,), (5, 2)], ids=["batch1", "batch2"])
def test_turns_at_keep_all_are_the_models_own(family: str, texts: tuple[int, ...]) -> None:
    model, inputs = build(family), make_inputs(family, texts)
    before, _ = converse(model, inputs, 3)
    with prune(model, ViTCoP(retention_ratio=1.0)):
        inside, _ = converse(model, inputs, 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(inside, before, strict=True))


@pytest.mark.parametrize("texts", [(5,), (5, 2)], ids=["batch1", "batch2"])
def test_turns_go_on_from_the_pruned_cache(family: str, texts: tuple[int, ...]) -> None:
    """The same as feeding the tokens one after the other; nothing is pruned or encoded again."""
    model, inputs = build(family), make_inputs(family, texts)
    with prune(model, METHOD) as stats:
        answers, _ = converse(model, inputs, 3)
        assert len(stats.records) == 1
        for row in range(len(texts)):
            first, cache = greedy_by_hand(model, take_row(inputs, row), 4)
            assert first.tolist() == answers[0][row : row + 1].tolist()
            for turn in (1, 2):
                last = answers[turn - 1][row : row + 1, -1:]
                logits = next_logits(model, torch.cat((last, questions(len(texts), turn + 1)[row : row + 1]), 1), cache)
                for token in answers[turn][row]:
                    assert logits.argmax() == token
                    logits = next_logits(model, token.view(1, 1), cache)
                cache.crop(-1)  # `generate` leaves an answer's last token to the next turn


def test_a_turn_may_bring_the_first_video_again(family: str) -> None:
    """Pixels of the video that is in the cache already change nothing."""
    model, inputs = build(family), make_inputs(family)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with prune(model, METHOD) as stats:
        result = model.generate(**inputs, **settings)
        answer = result.sequences[:, inputs["input_ids"].shape[1] :]
        turn = second_turn(inputs, answer, questions(1))
        caches = [copy.deepcopy(result.past_key_values) for _ in range(2)]
        without = model.generate(**turn, past_key_values=caches[0], **settings).sequences
        again = model.generate(**inputs | turn, past_key_values=caches[1], **settings).sequences
    assert torch.equal(without, again)
    assert len(stats.records) == 1


def test_another_video_in_a_later_turn_is_refused(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedInputError, match="start a conversation with its videos"):
            del inputs["attention_mask"]
            model(**inputs, past_key_values=cache)


def test_new_tokens_of_different_lengths(family: str) -> None:
    """A second turn whose questions are padded on the left goes on like each row alone."""
    model, inputs = build(family), make_inputs(family, (5, 2))
    asked = [torch.tensor([[30, 31, 32, 33]]), torch.tensor([[34, 35]])]
    padded = torch.cat([functional.pad(ids, (4 - ids.shape[1], 0), value=PAD) for ids in asked])
    mask = torch.cat((inputs["attention_mask"], (padded != PAD).long()), dim=1)
    with prune(model, METHOD):
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
        together = model(input_ids=padded, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        for row in range(2):
            single = {name: value for name, value in take_row(inputs, row).items() if name != "attention_mask"}
            cache = model(**single, use_cache=True).past_key_values
            alone = next_logits(model, asked[row], cache)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_mask_may_come_with_the_second_turn(family: str) -> None:
    """The prompts were not padded, the questions are."""
    model, inputs = build(family), make_inputs(family, (4, 4))
    del inputs["attention_mask"]
    asked = torch.tensor([[PAD, PAD, 34, 35], [30, 31, 32, 33]])
    length = inputs["input_ids"].shape[1]
    mask = functional.pad((asked != PAD).long(), (length, 0), value=1)
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        single = copy.deepcopy(cache)
        together = model(input_ids=asked, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        alone = next_logits(model, asked[:, 2:], single)
    torch.testing.assert_close(together[:1], alone[:1], rtol=0, atol=1e-4)


def test_a_conversation_shorter_than_the_cache_is_refused() -> None:
    model, inputs = build("llava"), make_inputs("llava")
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedInputError, match="the cache has seen"):
            model(input_ids=torch.tensor([[20]]), attention_mask=torch.ones(1, 5), past_key_values=cache)


# -- copies


def test_copies_of_a_cache_go_on_by_themselves(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    del inputs["attention_mask"]
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        copies = [copy.deepcopy(cache) for _ in range(2)]
        first = next_logits(model, torch.tensor([[20, 21]]), copies[0])
        next_logits(model, torch.tensor([[40]]), copies[1])
        assert torch.equal(first, next_logits(model, torch.tensor([[20, 21]]), cache))
        assert copies[1].get_seq_length() + 1 == cache.get_seq_length()


@pytest.mark.parametrize("texts", [(5,), (5, 2)], ids=["batch1", "batch2"])
def test_repeated_rows_of_a_cache(family: str, texts: tuple[int, ...]) -> None:
    """Several continuations of each prompt, one cache."""
    model, inputs = build(family), make_inputs(family, texts)
    ids = torch.randint(TEXT_FROM, VOCABULARY, (3 * len(texts), 2), generator=torch.Generator().manual_seed(2))
    mask = inputs["attention_mask"].repeat_interleave(3, dim=0)
    with prune(model, METHOD):
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        mask = functional.pad(mask, (0, 2), value=1)
        together = model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        for number, row in enumerate(ids):
            single = {n: v for n, v in take_row(inputs, number // 3).items() if n != "attention_mask"}
            alone = next_logits(model, row[None], model(**single, use_cache=True).past_key_values)
            torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-4)


def test_rows_that_do_not_fit_a_cache_are_refused() -> None:
    model, inputs = build("llava"), make_inputs("llava", (4, 4))
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedInputError, match="pruned for 2 rows, the input has 3"):
            model(input_ids=torch.full((3, 1), 20), past_key_values=cache)


def test_the_same_pixels_are_encoded_once(family: str) -> None:
    """A second question on the tensor of a clip reuses its tokens; other pixels, even in the same place, do not."""
    model, setup = build(family), SETUPS[family]
    inputs = {name: value.clone() for name, value in make_inputs(family).items()}
    calls: list[int] = []
    tower = (
        getattr(model.model, "visual", None) or getattr(model.model, "video_tower", None) or model.model.vision_tower
    )
    handle = tower.register_forward_pre_hook(lambda *args: calls.append(1))
    with prune(model, METHOD):
        first = model(**inputs, logits_to_keep=1).logits
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, first)
        assert len(calls) == 1
        other = inputs | {setup.name: inputs[setup.name] + 1}
        assert not torch.equal(model(**other, logits_to_keep=1).logits, first)
        assert len(calls) == 2
    handle.remove()


def test_pixels_changed_in_place_are_encoded_anew() -> None:
    with torch.inference_mode(False), torch.no_grad():
        model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
        with prune(model, METHOD):
            first = model(**inputs, logits_to_keep=1).logits
            inputs["pixel_values_videos"].add_(1)
            assert not torch.equal(model(**inputs, logits_to_keep=1).logits, first)


def test_placeholder_tokens_in_an_answer_are_text() -> None:
    """A model may say a placeholder token; fed back, it is embedded like any other."""
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
    with prune(model, METHOD):
        cache = model(**inputs, use_cache=True).past_key_values
        logits = next_logits(model, torch.tensor([[VIDEO, 20]]), cache)
    assert logits.shape == (1, VOCABULARY)
