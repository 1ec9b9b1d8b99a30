"""Pruned caches: what they record, what they may lose, turns, copies and rows that go on from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tests.vitcop.models import PAD, TEXT_FROM, VOCABULARY, build, make_inputs, take_row
from tests.vitcop.runs import FEW, METHOD, cached, greedy_by_hand, next_logits, run
from vitcop import UnsupportedInputError, ViTCoP, get_method, prune, record_of


def test_two_clips_in_flight_have_a_record_each_and_go_on_from_their_own_caches(family: str) -> None:
    model, method = build(family), ViTCoP(retention_ratio=0.3)
    clips = [make_inputs(family, (5,), seed=1), make_inputs(family, (4, 2), seed=2)]
    with prune(model, method):
        alone = [run(model, inputs, steps=1) for inputs in clips]
    with prune(model, method) as stats:
        caches = [model(**inputs, use_cache=True).past_key_values for inputs in clips]
        copies = copy.deepcopy(caches)
        for cache, inputs, (logits, lengths) in zip(copies, clips, alone, strict=True):
            mask = functional.pad(inputs["attention_mask"], (0, 1), value=1)
            ids = torch.full((len(mask), 1), TEXT_FROM)
            step = model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
            torch.testing.assert_close(step.logits[:, -1], logits[1], rtol=0, atol=1e-5)
            assert cached(cache) == lengths[1]
    for record, cache, copied, inputs in zip(stats.records, caches, copies, clips, strict=True):
        assert record_of(cache) is record is record_of(copied)
        assert record.batch == len(inputs["input_ids"])
        assert [record.prompt_tokens + kept for kept in record.kept_per_layer] == cached(cache)


def test_caches_of_unpruned_prefills_have_a_record_and_those_of_text_have_none(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with prune(model, ViTCoP(retention_ratio=1.0)) as stats:
        cache = model(**inputs, use_cache=True).past_key_values
        text = model(input_ids=torch.tensor([[20, 21]]), use_cache=True).past_key_values
    assert record_of(cache) is stats.last
    assert record_of(text) is None
    assert record_of(model(**inputs, use_cache=True).past_key_values) is None


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
