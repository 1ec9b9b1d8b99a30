"""Answers of tiny models: what the questions of a clip share must not change what any of them gets."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import vitcop.families
from pipeline.config import AnswerConfig, JobConfig, ModelConfig, PruneConfig
from pipeline.errors import ConfigError, RowError
from pipeline.model.answer import Answer
from pipeline.model.answering import VideoQA, build_method
from pipeline.model.clock import PhaseClock
from pipeline.model.generation import AnswerRow, TokenChooser
from pipeline.model.load import LoadedModel, default_scoring, load_model
from pipeline.model.prefix import ClipPrefix, log_likelihoods, read_prompts
from pipeline.model.prompt import Prompt, Question
from pipeline.model.session import Session
from pipeline.video import DecodedVideo
from tests.pipeline.model.tiny_models import FRAMES, save_checkpoint
from vitcop import prune
from vitcop.budget import Geometry, Plan
from vitcop.methods import METHODS, Random

OPEN = Question(question="What happens here?")
COLOR = Question(question="Which color is it?", options=("red", "dark blue", "green"), answer="green")
YES_NO = Question(question="Does it move?", options=("yes", "no"), answer="A")
QUESTIONS = (OPEN, COLOR, YES_NO)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_checkpoint("llava_onevision", tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture(scope="module")
def video() -> DecodedVideo:
    return make_video(8, seed=0)


def make_video(num_frames: int, seed: int, size: tuple[int, int] = (56, 56)) -> DecodedVideo:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)
    return DecodedVideo(
        frames=frames,
        indices=np.arange(num_frames),
        timestamps=np.arange(num_frames) / 2,
        start_time=0.0,
        fps=2.0,
        total_frames=num_frames,
        duration=num_frames / 2,
        codec="h264",
        decoder="pyav",
        requested_frames=num_frames,
        lost=(),
        truncated=False,
    )


def make_qa(
    loaded: LoadedModel, method: str = "vitcop", keep_ratio: float = 0.25, scoring: str = "likelihood"
) -> VideoQA:
    pruning = build_method(PruneConfig(method=method, keep_ratio=keep_ratio))
    return VideoQA(loaded, pruning, AnswerConfig(choice_scoring=scoring, max_new_tokens=12))


def prompt_of(qa: VideoQA, video: DecodedVideo, question: Question) -> Prompt:
    return qa.prompts.build(question, ClipPrefix(qa.loaded, video, share=True).placeholders)


def full_inputs(qa: VideoQA, video: DecodedVideo, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """The inputs of one plain forward over a whole prompt."""
    frames = torch.from_numpy(video.frames)
    inputs = {"input_ids": torch.tensor([ids]), **qa.loaded.frame_processor.to_model_inputs(frames, video.times)}
    if "video_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == qa.loaded.model.config.video_token_id).int() * 2
    return inputs


@dataclass(frozen=True, kw_only=True)
class Attentive(Random):
    """Says that it looks at the question, so that nothing but the vision tower may be shared."""

    name: ClassVar[str] = "attentive"
    query_aware: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Idle(Random):
    """Keeps everything, whatever it is asked to keep."""

    name: ClassVar[str] = "idle"

    def plan(self, geometry: Geometry) -> Plan:
        return Plan(entering=geometry.num_tokens)


@pytest.fixture
def more_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (Attentive, Idle):
        monkeypatch.setitem(METHODS, method.name, method)


def generate_alone(qa: VideoQA, video: DecodedVideo, question: Question) -> str:
    """The answer of one plain `generate` over the whole prompt."""
    prompt = prompt_of(qa, video, question)
    output = qa.loaded.model.generate(
        **full_inputs(qa, video, prompt.ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return qa.loaded.tokenizer.decode(output[0, len(prompt.ids) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("method", ["vitcop", "none"])
def test_keeping_all_answers_as_the_unpatched_model(loaded: LoadedModel, video: DecodedVideo, method: str) -> None:
    qa = make_qa(loaded, method, keep_ratio=1.0)
    answers = qa.answer(video, [OPEN, Question(question="And then?")])
    assert [answer.prediction for answer in answers] == [
        generate_alone(qa, video, OPEN),
        generate_alone(qa, video, Question(question="And then?")),
    ]
    assert len({answer.prediction for answer in answers}) == 2
    assert answers[0].visual_tokens_kept == answers[0].visual_tokens_full == 8 * 16


@pytest.mark.parametrize("method", ["vitcop", "random"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_pruned_answer_is_that_of_a_separate_run(
    loaded: LoadedModel, video: DecodedVideo, method: str, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", penalty)
    qa = make_qa(loaded, method)
    with prune(loaded.model, qa.method):
        expected = generate_alone(qa, video, OPEN)
    assert qa.answer(video, [YES_NO, OPEN])[1].prediction == expected
    assert qa.answer(video, [OPEN])[0].prediction == expected


def score(clip: ClipPrefix, prompt: Prompt, answers: list[list[int]]) -> Tensor:
    """(n,) log-probability of each answer, as a session scores it."""
    clip.read(prompt)
    (scores,) = log_likelihoods(clip.model, read_prompts([(clip, prompt)]), [answers])
    return scores


def log_likelihoods_alone(qa: VideoQA, video: DecodedVideo, prompt: Prompt, answers: list[list[int]]) -> Tensor:
    """One whole pass for each answer, scored token by token."""
    scores = []
    for answer in answers:
        ids = (*prompt.ids, *answer)
        logits = qa.loaded.model(**full_inputs(qa, video, ids)).logits[0]
        steps = logits[-len(answer) - 1 : -1].log_softmax(-1)
        scores.append(sum(step[token] for step, token in zip(steps, answer, strict=True)))
    return torch.stack(scores)


@pytest.fixture(scope="module", params=FRAMES)
def any_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.mark.parametrize("keep_ratio", [1.0, 0.25])
@pytest.mark.parametrize("share", [True, False])
@torch.inference_mode()
def test_options_are_scored_as_in_whole_passes(any_family: LoadedModel, keep_ratio: float, share: bool) -> None:
    video = make_video(8, seed=0, size=any_family.frame_processor.frame_size(40, 56, 8))
    qa = make_qa(any_family, keep_ratio=keep_ratio)
    prompt = prompt_of(qa, video, COLOR)
    answers = [qa.prompts.answer_ids(prompt, option) for option in COLOR.options]
    with prune(any_family.model, qa.method):
        clip = ClipPrefix(any_family, video, share=share)
        scores = [score(clip, prompt, answers) for _ in range(2)]
        expected = log_likelihoods_alone(qa, video, prompt, answers)
    assert torch.allclose(scores[0], expected, atol=1e-4)
    assert torch.equal(scores[0], scores[1]), "scoring must leave the shared cache as it was"


@pytest.mark.parametrize("keep_ratio", [1.0, 0.25])
def test_every_family_generates_as_in_a_separate_run(any_family: LoadedModel, keep_ratio: float) -> None:
    video = make_video(8, seed=1, size=any_family.frame_processor.frame_size(56, 40, 8))
    qa = make_qa(any_family, keep_ratio=keep_ratio)
    first, second = qa.answer(video, [OPEN, COLOR])
    if keep_ratio == 1:
        assert first.prediction == generate_alone(qa, video, OPEN)
    else:
        with prune(any_family.model, qa.method):
            assert first.prediction == generate_alone(qa, video, OPEN)
    assert abs(first.visual_tokens_kept - keep_ratio * first.visual_tokens_full) <= 1
    assert second.error is None


def test_the_most_likely_option_is_the_answer(loaded: LoadedModel, video: DecodedVideo) -> None:
    qa = make_qa(loaded)
    for question in (COLOR, YES_NO):
        prompt = prompt_of(qa, video, question)
        answers = [qa.prompts.answer_ids(prompt, option) for option in question.options]
        with prune(loaded.model, qa.method), torch.inference_mode():
            best = int(log_likelihoods_alone(qa, video, prompt, answers).argmax())
        (answer,) = qa.answer(video, [question])
        assert (answer.choice, answer.prediction) == (best, question.options[best])
        assert answer.correct is (best == {COLOR: 2, YES_NO: 0}[question])
        assert answer.generated_tokens == 0


def test_the_most_likely_letter_is_the_answer(loaded: LoadedModel, video: DecodedVideo) -> None:
    """Of the letters that are offered, whatever else the model would rather say."""
    qa = make_qa(loaded, scoring="likelihood-letter")
    for question in (COLOR, YES_NO):
        prompt = prompt_of(qa, video, question)
        assert f"A. {question.options[0]}\nB. {question.options[1]}" in prompt.tail
        with prune(loaded.model, qa.method), torch.inference_mode():
            logits = loaded.model(**full_inputs(qa, video, prompt.ids)).logits[0, -1]
        letters = [loaded.tokenizer.convert_tokens_to_ids(letter) for letter in "ABC"[: len(question.options)]]
        best = int(logits[letters].argmax())
        (answer,) = qa.answer(video, [question])
        assert (answer.choice, answer.prediction) == (best, question.options[best])
        assert (answer.error, answer.generated_tokens) == (None, 0)


def test_options_are_shown_except_where_their_likelihood_is_asked_for(loaded: LoadedModel, video: DecodedVideo) -> None:
    for scoring, shown in (("likelihood", False), ("likelihood-letter", True), ("generate", True)):
        tail = prompt_of(make_qa(loaded, scoring=scoring), video, COLOR).tail
        assert ("B. dark blue" in tail) is shown, scoring


def scoring_of(config: JobConfig) -> str:
    return VideoQA(load_model(config.model.model), build_method(config.prune), config.answer).choice_scoring


def test_a_checkpoint_may_say_how_it_answers_multiple_choice(tmp_path: Path) -> None:
    """What no checkpoint says is that of public benchmarks: the answer is read from what the model generates."""
    folder = save_checkpoint("llava_onevision", tmp_path)
    file, settings = folder / "config.json", JobConfig(model=ModelConfig(model=str(folder)))
    config = json.loads(file.read_text())
    assert default_scoring(str(folder)) == scoring_of(settings) == "generate"
    file.write_text(json.dumps(config | {"choice_scoring": "likelihood-letter"}))
    assert default_scoring(str(folder)) == scoring_of(settings) == "likelihood-letter"
    asked = dataclasses.replace(settings, answer=AnswerConfig(choice_scoring="likelihood"))
    assert scoring_of(asked) == "likelihood"
    file.write_text(json.dumps(config | {"choice_scoring": "guess"}))
    with pytest.raises(ConfigError, match="is 'guess'; it must be one of generate, likelihood, likelihood-letter"):
        default_scoring(str(folder))
    assert default_scoring("embedded") == "likelihood"


@pytest.mark.parametrize(
    ("output", "choice", "correct"), [("B.", 1, False), ("It is green", 2, True), ("No idea", None, False)]
)
def test_a_generated_choice_is_read_from_the_text(
    loaded: LoadedModel, video: DecodedVideo, monkeypatch: pytest.MonkeyPatch, output: str, choice: int, correct: bool
) -> None:
    tokens = loaded.tokenizer(output + "<|im_end|>").input_ids

    def say(chooser: TokenChooser, scores: Tensor, rows: list[AnswerRow]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([tokens[len(row.new_ids)] for row in rows]), scores.shape[1])

    monkeypatch.setattr(TokenChooser, "_process", say)
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", tokens[-1])
    (answer,) = make_qa(loaded, scoring="generate").answer(video, [COLOR])
    assert (answer.prediction, answer.choice, answer.correct, answer.error) == (output, choice, correct, None)
    assert answer.generated_tokens == len(output) + 1


def test_open_answers_are_right_when_they_match_the_expected_text(loaded: LoadedModel, video: DecodedVideo) -> None:
    qa = make_qa(loaded)
    said = qa.answer(video, [OPEN])[0].prediction
    asked = [Question(question=OPEN.question, answer=answer) for answer in (said.upper(), "something else", None)]
    assert [answer.correct for answer in qa.answer(video, asked)] == [True, False, None]


@pytest.mark.parametrize("method", ["vitcop", "random"])
def test_a_quarter_is_kept_and_reported(loaded: LoadedModel, video: DecodedVideo, method: str) -> None:
    for answer in make_qa(loaded, method).answer(video, QUESTIONS):
        assert answer.error is None
        assert answer.visual_tokens_full == 128
        assert abs(answer.visual_tokens_kept - 32) <= 1
        assert all(0 < kept < 128 for kept in answer.visual_tokens_stages.values())


@pytest.mark.parametrize("method", ["vitcop", "attentive"])
@pytest.mark.usefixtures("more_methods")
def test_the_vision_tower_runs_once_for_a_clip(loaded: LoadedModel, video: DecodedVideo, method: str) -> None:
    calls: list[int] = []
    handle = loaded.model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(1))
    answers = make_qa(loaded, method).answer(video, QUESTIONS)
    handle.remove()
    assert [answer.error for answer in answers] == [None] * 3
    assert len(calls) == 1


@pytest.mark.usefixtures("more_methods")
def test_the_language_model_reads_the_video_once_unless_the_method_reads_the_question(
    loaded: LoadedModel, video: DecodedVideo
) -> None:
    for method, expected in (("random", 1), ("attentive", len(QUESTIONS))):
        lengths: list[int] = []
        handle = loaded.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=lengths: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        make_qa(loaded, method).answer(video, QUESTIONS)
        handle.remove()
        assert sum(length >= 32 + 7 for length in lengths) == expected, method


@pytest.mark.usefixtures("more_methods")
def test_sharing_changes_no_answer(loaded: LoadedModel, video: DecodedVideo) -> None:
    shared, separate = (make_qa(loaded, method).answer(video, QUESTIONS) for method in ("random", "attentive"))
    assert [answer.prediction for answer in shared] == [answer.prediction for answer in separate]
    assert [answer.prompt_tokens for answer in shared] == [answer.prompt_tokens for answer in separate]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.query_aware])
@torch.inference_mode()
def test_a_method_that_does_not_read_the_question_may_share(
    loaded: LoadedModel, video: DecodedVideo, name: str
) -> None:
    qa = make_qa(loaded, name)
    prompt = prompt_of(qa, video, COLOR)
    answers = [qa.prompts.answer_ids(prompt, option) for option in COLOR.options]
    with prune(loaded.model, qa.method):
        shared, separate = (score(ClipPrefix(loaded, video, share=share), prompt, answers) for share in (True, False))
    assert torch.allclose(shared, separate, atol=1e-4)


def test_clips_of_different_lengths_follow_each_other(loaded: LoadedModel, video: DecodedVideo) -> None:
    qa = make_qa(loaded)
    first = qa.answer(video, QUESTIONS)
    other = qa.answer(make_video(4, seed=1), QUESTIONS)
    assert {answer.visual_tokens_full for answer in other} == {64}
    assert [answer.prediction for answer in qa.answer(video, QUESTIONS)] == [answer.prediction for answer in first]


def test_a_bad_question_costs_only_its_own_row(loaded: LoadedModel, video: DecodedVideo) -> None:
    bad = [
        Question(question="Which?", options=("red", "green"), answer="blue"),
        Question(question="Is <video> there?"),
        Question(question="Which?", options=("red", "<|im_end|>")),
    ]
    *errors, fine = make_qa(loaded).answer(video, [*bad, COLOR])
    assert [error.error and error.error.error_type for error in errors] == [
        "bad_answer",
        "bad_question",
        "bad_question",
    ]
    assert fine.error is None
    assert fine.prediction == make_qa(loaded).answer(video, [COLOR])[0].prediction


def test_running_out_of_memory_is_an_error_of_the_row(
    loaded: LoadedModel, video: DecodedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    qa = make_qa(loaded)
    tower = loaded.model.model.vision_tower

    def run_out(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nDetails follow.")

    monkeypatch.setattr(tower, "forward", run_out)
    for answer in qa.answer(video, [OPEN, COLOR]):
        assert answer.error is not None
        assert answer.error.error_type == "out_of_memory"
        assert "9 GiB. Use fewer frames or a lower --keep-ratio" in answer.error.message
        assert "Details" not in answer.error.message
    monkeypatch.undo()
    assert qa.answer(video, [OPEN])[0].error is None


def test_scores_that_are_not_numbers_are_no_answer(
    loaded: LoadedModel, video: DecodedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loaded.model.lm_head.forward
    monkeypatch.setattr(loaded.model.lm_head, "forward", lambda hidden: plain(hidden) * float("nan"))
    for answer in make_qa(loaded).answer(video, [OPEN, COLOR]):
        assert answer.error is not None
        assert (answer.error.error_type, answer.prediction) == ("not_a_number", "")


def test_a_ratio_that_a_clip_cannot_meet_is_an_error_of_the_row(loaded: LoadedModel) -> None:
    (answer,) = make_qa(loaded, "random", keep_ratio=0.01).answer(make_video(1, seed=0), [OPEN])
    assert answer.error is not None
    assert answer.error.error_type == "cannot_prune"
    assert "keeps less than one of 16 visual tokens" in answer.error.message


@pytest.mark.usefixtures("more_methods")
def test_a_method_that_does_not_prune_is_no_result(loaded: LoadedModel, video: DecodedVideo) -> None:
    with pytest.raises(RuntimeError, match=r"Idle\(retention_ratio=0\.25.* kept all 128 visual tokens"):
        make_qa(loaded, "idle").answer(video, [OPEN])


def test_the_model_is_left_as_it_was(loaded: LoadedModel, video: DecodedVideo) -> None:
    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in loaded.model.modules()]

    qa = make_qa(loaded)
    qa.answer(video, QUESTIONS)
    before = hooks()  # transformers leaves some of its own at the first call
    qa.answer(video, QUESTIONS)
    assert hooks() == before
    with prune(loaded.model, qa.method):
        assert hooks() != before


def test_costs_are_reported(loaded: LoadedModel, video: DecodedVideo) -> None:
    first, second = make_qa(loaded).answer(video, [OPEN, COLOR])
    assert first.seconds_vision > 0
    assert second.seconds_vision == 0, "the vision tower counts for the first question"
    for answer in (first, second):
        assert answer.seconds_prefill > 0
        assert answer.seconds_generate > 0
        assert answer.peak_memory_bytes > 1e6
    assert first.generated_tokens == 12
    assert first.prompt_tokens == len("user\n\nWhat happens here?\nassistant\n") + 3 + 1, "3 turn marks, newline token"


def test_the_clock_adds_up_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([0.0, 1.0, 10.0, 12.0, 16.0, 24.0, 40.0, 50.0, 51.0])
    monkeypatch.setattr(PhaseClock, "_now", lambda clock: next(times))
    clock = PhaseClock(torch.device("cpu"))
    clock("vision")
    clock.expect("prefill")
    for label in ("prefill", "step", "step", "generate"):
        clock(label)
    assert clock.take() == {"vision": 1.0, "prefill": 2.0 + 4.0, "generate": 8.0 + 16.0}
    clock.expect("generate")
    clock("step")
    assert clock.take() == {"generate": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "unheard_of"}, "--method unheard_of: unknown pruning method.*known are"),
        ({"method": "vitcop", "method_options": {"color": 1}}, "--method vitcop:.*color"),
        ({"method": "vitcop", "method_options": {"merge": "never"}}, "--method vitcop: merge must be"),
    ],
)
def test_a_method_that_is_not_there_is_a_configuration_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(PruneConfig(**settings))


def test_method_options_reach_the_method() -> None:
    assert build_method(PruneConfig(method="random", keep_ratio=0.5, method_options={"seed": 7})) == Random(
        retention_ratio=0.5, seed=7
    )
    assert build_method(PruneConfig(method="none", keep_ratio=0.5)).retention_ratio == 1


def test_a_model_that_cannot_be_pruned_is_a_configuration_error(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitcop.families, "FAMILIES", {})
    with pytest.raises(ConfigError, match="can't be pruned"):
        make_qa(loaded)


def test_errors_hold_on_to_nothing() -> None:
    def fail() -> Answer:
        raise RowError("bad_answer", "no")

    error = Session._attempt(fail)
    assert isinstance(error, RowError)
    assert error.__traceback__ is None
    assert error.__context__ is None
    assert pickle.loads(pickle.dumps(error)).message == "no"


def test_other_exceptions_are_not_swallowed() -> None:
    def fail() -> Answer:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        Session._attempt(fail)


def test_the_frame_size_travels_to_the_decoder(loaded: LoadedModel) -> None:
    size: Callable[[int, int, int], tuple[int, int]] = pickle.loads(pickle.dumps(make_qa(loaded).frame_size))
    assert size(120, 90, 8) == (56, 56)
