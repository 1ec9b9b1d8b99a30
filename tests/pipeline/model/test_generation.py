"""From logits to tokens: greedy, drawn, ended; as `generate` does it, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.config import AnswerConfig
from pipeline.errors import ConfigError
from pipeline.model.generation import AnswerRow, TokenChooser, row_seed
from pipeline.model.load import LoadedModel, load_model
from tests.pipeline.model.tiny_models import save_checkpoint


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_checkpoint("llava_onevision", tmp_path_factory.mktemp("checkpoint"))))


def make_chooser(loaded: LoadedModel, **answer: Any) -> TokenChooser:
    return TokenChooser(loaded.model, loaded.tokenizer, AnswerConfig(**answer))


def logits_of(*likely: int, size: int = 300) -> torch.Tensor:
    """(R, size) one likely token for each row."""
    return 9.0 * torch.nn.functional.one_hot(torch.tensor(likely), size).float()


def test_greedy_takes_the_most_likely_token_and_ends_at_the_end_of_the_turn(loaded: LoadedModel) -> None:
    chooser = make_chooser(loaded, max_new_tokens=3)
    end = chooser.end_ids[0]
    rows = [AnswerRow(prompt_ids=(1,)) for _ in range(2)]
    chooser.choose(logits_of(65, end), rows)
    assert [row.new_ids for row in rows] == [[65], [end]]
    assert (rows[0].ended, rows[1].text) == (False, "")
    for _ in range(2):
        chooser.choose(logits_of(66), rows[:1])
    assert rows[0].new_ids == [65, 66, 66] and rows[0].ended, "as long as an answer may be"


def test_an_answer_is_not_shorter_than_asked_for(loaded: LoadedModel) -> None:
    chooser = make_chooser(loaded, min_new_tokens=2)
    end = chooser.end_ids[0]
    row, old = AnswerRow(prompt_ids=(1,)), AnswerRow(prompt_ids=(1,), new_ids=[65, 66])
    logits = logits_of(end, end)
    logits[:, 70] = 5.0
    chooser.choose(logits, [row, old])
    assert (row.new_ids, row.ended) == ([70], False)
    assert (old.new_ids[-1], old.ended) == (end, True)


def test_text_ends_before_a_stop_string(loaded: LoadedModel) -> None:
    chooser = make_chooser(loaded, stop=("\n", "END"), max_new_tokens=50)
    row = AnswerRow(prompt_ids=(1,))
    for token in loaded.tokenizer("a redENDcar\n").input_ids:
        if not row.ended:
            chooser.choose(logits_of(token, size=len(loaded.tokenizer)), [row])
    assert row.text == "a red"


def test_drawn_tokens_have_the_probabilities_that_generate_draws_by(loaded: LoadedModel) -> None:
    settings = {"temperature": 0.7, "top_k": 6, "top_p": 0.8}
    chooser = make_chooser(loaded, **settings)
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(6), TopPLogitsWarper(0.8)])
    expected = warpers(torch.empty(0), logits.clone()).softmax(-1)[0]
    rows = [AnswerRow(prompt_ids=(1,), seed=row_seed(0, number)) for number in range(4000)]
    chooser.choose(logits.expand(len(rows), -1), rows)
    drawn = torch.bincount(torch.tensor([row.new_ids[0] for row in rows]), minlength=300) / len(rows)
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 0.04


def test_one_likely_token_is_drawn_like_the_greedy_one(loaded: LoadedModel) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    drawn, greedy = ([AnswerRow(prompt_ids=(1,), seed=n) for n in range(5)] for _ in range(2))
    make_chooser(loaded, temperature=2.0, top_k=1).choose(logits, drawn)
    make_chooser(loaded).choose(logits, greedy)
    assert [row.new_ids for row in drawn] == [row.new_ids for row in greedy]


def test_the_repetition_penalty_counts_the_prompt_and_each_row_for_itself(loaded: LoadedModel) -> None:
    chooser = make_chooser(loaded, repetition_penalty=2.0)
    logits = torch.zeros(2, 300)
    logits[:, 40], logits[:, 41], logits[:, 42] = 4.0, 3.0, 2.5
    rows = [AnswerRow(prompt_ids=(40, 7, 7, 7)), AnswerRow(prompt_ids=(9,), new_ids=[41])]
    chooser.choose(logits, rows)
    assert [row.new_ids[-1] for row in rows] == [41, 40]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_numbers_is_an_error_of_that_row(loaded: LoadedModel, value: float) -> None:
    logits = logits_of(65, 66)
    logits[0, 3] = value
    rows = [AnswerRow(prompt_ids=(1,)) for _ in range(2)]
    make_chooser(loaded).choose(logits, rows)
    assert rows[0].error is not None and rows[0].error.error_type == "not_a_number" and rows[0].new_ids == []
    assert (rows[1].error, rows[1].new_ids) == (None, [66])


def test_seeds_tell_rows_apart() -> None:
    seeds = {row_seed(seed, name, sample) for seed in (0, 1) for name in ("a", "b", "ab") for sample in (0, 1)}
    assert len(seeds) == 12


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"num_samples": 0},
        {"num_samples": 2},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        AnswerConfig(**settings)
