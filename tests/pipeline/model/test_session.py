"""Many clips at a time get the answers that each gets alone, whatever is beside them and whatever goes wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import AnswerConfig, PruneConfig
from pipeline.model.admission import RowLimit
from pipeline.model.answer import Answer
from pipeline.model.answering import VideoQA, build_method
from pipeline.model.generation import DecodeBatch
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.prompt import Question
from pipeline.video import DecodedVideo
from tests.pipeline.model.test_answering import make_video
from tests.pipeline.model.tiny_models import FRAMES, save_checkpoint

OPEN = Question(question="What happens here?", name="open")
LONG = Question(question="Which of the many things that move about in here is it that moves first?", name="long")
COLOR = Question(question="Which color is it?", options=("red", "dark blue", "green"), answer="green")
BAD = Question(question="Is <video> there?")
Clips = dict[str, tuple[DecodedVideo, list[Question]]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_checkpoint("llava_onevision", tmp_path_factory.mktemp("checkpoint"))))


def make_qa(loaded: LoadedModel, method: str = "vitcop", ratio: float = 0.3, **answer: Any) -> VideoQA:
    config = AnswerConfig(**{"choice_scoring": "likelihood", "max_new_tokens": 6} | answer)
    return VideoQA(loaded, build_method(PruneConfig(method=method, keep_ratio=ratio)), config)


def make_clips(loaded: LoadedModel, seed: int, count: int = 5) -> Clips:
    """Clips of different lengths with different questions."""
    order = random.Random(seed)
    size = loaded.frame_processor.frame_size(40, 56, 8)
    return {
        f"clip {number}": (
            make_video(order.choice((2, 4, 8)), seed=100 * seed + number, size=size),
            order.choices((OPEN, LONG, COLOR, COLOR, BAD), k=order.randint(1, 4)),
        )
        for number in range(count)
    }


def answer_together(qa: VideoQA, clips: Clips, limit: RowLimit, seed: int = 0) -> dict[str, list[Answer]]:
    """All clips through one session; each comes in at a random moment."""
    moments, waiting, answers = random.Random(seed), list(clips), {}
    with qa.session(limit) as session:
        while waiting or session.busy:
            if waiting and (moments.random() < 0.5 or not session.busy):
                name = waiting.pop(0)
                session.add(name, *clips[name])
            answers |= dict(session.step())
    return answers


def said(answers: dict[str, list[Answer]]) -> dict[str, list[tuple[Any, ...]]]:
    """What the answers say, without what they cost."""
    return {
        name: [
            (a.prediction, a.choice, a.correct, a.samples, a.generated_tokens, a.error and a.error.error_type)
            for a in each
        ]
        for name, each in answers.items()
    }


def alone(qa: VideoQA, clips: Clips) -> dict[str, list[tuple[Any, ...]]]:
    return said({name: [qa.answer(video, [q])[0] for q in questions] for name, (video, questions) in clips.items()})


@pytest.mark.parametrize("family", FRAMES)
def test_answers_are_those_of_each_clip_alone(family: str, tmp_path: Path) -> None:
    loaded = load_model(str(save_checkpoint(family, tmp_path)))
    for seed, method in enumerate(("vitcop", "fastv", "none")):
        qa, clips = make_qa(loaded, method, 0.4), make_clips(loaded, seed)
        names = list(clips)
        random.Random(seed).shuffle(names)
        together = answer_together(qa, {name: clips[name] for name in names}, RowLimit(loaded, 3 + 2 * seed), seed)
        assert said(together) == {name: alone(qa, clips)[name] for name in together}, method
        assert set(together) == set(clips)


def test_samples_of_a_row_do_not_depend_on_what_is_beside_it(loaded: LoadedModel) -> None:
    qa = make_qa(loaded, temperature=1.5, num_samples=3, top_p=0.9, top_k=50)
    clips = {name: (video, [OPEN, LONG]) for name, (video, _) in make_clips(loaded, 1).items()}
    together = answer_together(qa, clips, RowLimit(loaded, 7))
    assert said(together) == alone(qa, clips)
    samples = together["clip 0"][0].samples
    assert samples is not None and len(samples) == 3 and len(set(samples)) > 1
    assert together["clip 0"][0].prediction == samples[0]
    other = make_qa(loaded, temperature=1.5, num_samples=3, seed=1).answer(*clips["clip 0"])
    assert other[0].samples != samples


def test_a_long_answer_holds_up_no_other_clip(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end leave the batch, and the next clip comes in while the long one goes on."""
    qa, clips = make_qa(loaded, max_new_tokens=40), make_clips(loaded, 2, count=4)
    finished: list[str] = []
    with qa.session(RowLimit(loaded, 2)) as session:
        for name, (video, _) in clips.items():
            session.add(name, video, [OPEN if name == "clip 0" else COLOR])
        while session.busy:
            finished += [ticket for ticket, _ in session.step()]
    assert finished[-1] == "clip 0" and len(finished) == 4


class RunsOut:
    """Raises out of memory while more than so many rows are decoded."""

    def __init__(self, rows: int) -> None:
        self.rows, self.raised, self.step = rows, 0, DecodeBatch.step

    def __get__(self, batch: DecodeBatch, kind: type) -> Any:
        def step() -> Any:
            if len(batch.rows) > self.rows:
                self.raised += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nDetails.")
            return self.step(batch)

        return step


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_when_memory_runs_out_fewer_rows_are_decoded(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    qa = make_qa(loaded)
    clips = {name: (video, [OPEN, LONG]) for name, (video, _) in make_clips(loaded, 3).items()}
    expected = alone(qa, clips)
    monkeypatch.setattr(DecodeBatch, "step", runs_out := RunsOut(rows))
    limit = RowLimit(loaded, 8)
    assert said(answer_together(qa, clips, limit)) == expected
    assert runs_out.raised and limit.rows <= max(rows, 1)


def test_a_row_that_does_not_fit_alone_has_the_error(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    qa, (video, _) = make_qa(loaded), make_clips(loaded, 4)["clip 0"]
    monkeypatch.setattr(DecodeBatch, "step", RunsOut(0))
    answers = answer_together(qa, {"a": (video, [OPEN, COLOR, LONG])}, RowLimit(loaded, 4))["a"]
    assert [answer.error and answer.error.error_type for answer in answers] == ["out_of_memory", None, "out_of_memory"]
    assert "9 GiB. Use fewer frames or a lower --keep-ratio" in str(answers[0].error)


def test_a_prompt_that_runs_out_of_memory_waits_for_room(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking several questions at once is too much; one at a time is not."""
    qa, (video, _) = make_qa(loaded), make_clips(loaded, 5)["clip 0"]
    questions = [OPEN, LONG, COLOR]
    expected = alone(qa, {"a": (video, questions)})
    from pipeline.model import session

    read = session.read_prompts

    def run_out(prompts: Any) -> Any:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read(prompts)

    monkeypatch.setattr(session, "read_prompts", run_out)
    assert said(answer_together(qa, {"a": (video, questions)}, RowLimit(loaded, 8))) == expected


def test_scores_of_one_row_that_are_no_numbers_leave_the_others_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    qa, clips = make_qa(loaded), make_clips(loaded, 6)
    clips = {name: (video, [OPEN]) for name, (video, _) in clips.items()}
    expected = alone(qa, clips)
    choose = qa.session(RowLimit(loaded))._decoding.chooser.__class__.choose

    def spoil(chooser: Any, logits: torch.Tensor, rows: Any) -> None:
        hit = [number for number, row in enumerate(rows) if row.seed == rows[0].seed and len(row.new_ids) == 3]
        if len(rows) > 1 and hit:
            logits = logits.clone()
            logits[hit[0], 5] = float("inf")
        choose(chooser, logits, rows)

    monkeypatch.setattr("pipeline.model.generation.TokenChooser.choose", spoil)
    together = said(answer_together(qa, clips, RowLimit(loaded, 8)))
    spoiled = [name for name in together if together[name] != expected[name]]
    assert spoiled and len(spoiled) < len(clips)
    assert {together[name][0][-1] for name in spoiled} == {"not_a_number"}


def test_a_fault_of_the_program_is_not_taken_for_an_answer(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    qa, clips = make_qa(loaded), make_clips(loaded, 7)
    monkeypatch.setattr(DecodeBatch, "step", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_together(qa, {name: (video, [OPEN]) for name, (video, _) in clips.items()}, RowLimit(loaded, 8))


def test_a_session_has_room_until_its_rows_are_taken(loaded: LoadedModel) -> None:
    qa, (video, _) = make_qa(loaded), make_clips(loaded, 8)["clip 0"]
    with qa.session(RowLimit(loaded, 3)) as session:
        assert session.has_room and not session.busy
        session.add("a", video, [OPEN, LONG])
        assert session.has_room and session.busy
        session.add("b", video, [OPEN])
        assert not session.has_room


def test_rows_are_admitted_by_the_memory_that_they_will_need(loaded: LoadedModel) -> None:
    limit = RowLimit(loaded, 100)
    text = loaded.model.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    assert limit.cache_bytes(3) == 3 * 2 * text.num_hidden_layers * text.num_key_value_heads * width * 4
    limit._free = limit.cache_bytes(30)
    assert limit.allows(2, limit.cache_bytes(30)) and not limit.allows(2, limit.cache_bytes(31))
    qa, clips = make_qa(loaded), make_clips(loaded, 9)
    clips = {name: (video, [OPEN]) for name, (video, _) in clips.items()}
    most = 0
    with qa.session(limit) as session:  # room for less than one row: they go one by one
        for name, (video, questions) in clips.items():
            session.add(name, video, questions)
        while session.busy:
            session.step()
            most = max(most, len(session._decoding.rows))
    assert most == 1
