"""One clip and its questions, answered by a pruned model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from pipeline.config import CALIBRATED, JobConfig, PruneConfig
from pipeline.errors import ConfigError, RowError
from pipeline.model.choices import parse_choice, same_answer
from pipeline.model.frames import FrameSize
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.prompt import Prompt, PromptBuilder, Question
from pipeline.options import LETTERS
from pipeline.video import DecodedVideo
from vitcop import (
    Method,
    PrefillRecord,
    ProfileError,
    PruneStats,
    UnreachableBudgetError,
    UnsupportedInputError,
    UnsupportedModelError,
    VisionCache,
    family_of,
    get_method,
    prune,
)
from vitcop.calibration.profiles import COMMAND, find_profile

__all__ = ["Answer", "Question", "VideoQA"]

GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,  # done by `RepetitionPenalty`
}

ModelInputs = dict[str, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question, and what it took.

    Attributes:
        prediction: the generated text, or the text of the most likely option.
        choice: index of the chosen option; None for open questions and outputs that name no option.
        correct: None when the right answer is not known.
        error: why there is no answer.
        visual_tokens_full: visual tokens of the clip.
        visual_tokens_kept: of those, how many the language model kept, averaged over its layers.
        visual_tokens_stages: how many were left after each stage of pruning.
        prompt_tokens: tokens of the prompt that are not visual.
        generated_tokens: new tokens, the one that ends the turn included; 0 when options were scored.
        seconds_vision, seconds_selection, seconds_prefill, seconds_generate: the vision tower; choosing tokens; the
            language model's pass over the prompt; new tokens or the scoring of options. What the questions of a clip
            share (the vision tower, the pass over the video) counts for the first of them.
        peak_memory_bytes: on a GPU the most that was allocated since the clip began; on the CPU the most that the
            process ever held.
    """

    prediction: str = ""
    choice: int | None = None
    correct: bool | None = None
    error: RowError | None = None
    visual_tokens_full: int = 0
    visual_tokens_kept: float = 0.0
    visual_tokens_stages: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds_vision: float = 0.0
    seconds_selection: float = 0.0
    seconds_prefill: float = 0.0
    seconds_generate: float = 0.0
    peak_memory_bytes: int = 0


class VideoQA:
    """Answers the questions of one clip after another with one model and one pruning method.

    Args:
        config: `model`, `prune` and `answer` are read here, `frames` for the frames' size.
        loaded: a model that is already there, instead of the one that `config.model` names.
        vision: shared by several of these on one model, so that a clip goes through the vision tower once.

    Attributes:
        choice_scoring: how multiple choice is answered; with `auto` as the checkpoint says.
        record: what the pass over the last clip kept and cost; None before there was one.

    Raises:
        ConfigError: the model can't be loaded or pruned, or there is no such method or method option.
    """

    def __init__(self, config: JobConfig, loaded: LoadedModel | None = None, vision: VisionCache | None = None) -> None:
        self.config, self.vision = config, vision
        self.record: PrefillRecord | None = None
        self.loaded = loaded or load_model(**dataclasses.asdict(config.model), resize=config.frames.resize)
        self.method = build_method(recommended(config.prune, self.loaded))
        try:
            prune(self.loaded.model, self.method)
        except UnsupportedModelError as error:
            raise ConfigError(f"--model {self.loaded.name}: {error}") from error
        asked = config.answer.choice_scoring
        self.choice_scoring = self.loaded.default_scoring if asked == "auto" else asked
        frames = self.loaded.frame_processor
        self.prompts = PromptBuilder(
            self.loaded.tokenizer,
            config.answer,
            show_options=self.choice_scoring != "likelihood",
            video=frames.video_text,
            visual_token=frames.visual_token,
        )

    @property
    def frame_size(self) -> FrameSize:
        """The size at which the model takes frames: a picklable function that needs no torch, for the decoder."""
        return self.loaded.frame_processor.frame_size

    def answer(
        self, video: DecodedVideo, questions: Sequence[Question], pixels: ModelInputs | None = None
    ) -> list[Answer]:
        """One answer for each question, in order. What can go wrong with a clip or a question is in `Answer.error`.

        The vision tower runs once. With a method that does not look at the question, so does the language model over
        the video: each question goes on from a copy of that cache. Answers equal those of separate runs.

        Args:
            pixels: what `model_inputs` made of the video, where several methods share it.
        """
        device = self.loaded.device
        clock = PhaseClock(device)
        _reset_peak_memory(device)
        chunk = self.config.prune.frame_chunk
        with (
            torch.inference_mode(),
            prune(self.loaded.model, self.method, frame_chunk=chunk, clock=clock, vision=self.vision) as stats,
        ):
            clip = attempt(partial(Clip, self.loaded, video, share=self._share, pixels=pixels))
            if isinstance(clip, RowError):
                return [Answer(error=clip) for _ in questions]
            clock("vision")
            answers = [attempt(partial(self._answer, clip, question, stats, clock)) for question in questions]
        return [Answer(error=answer) if isinstance(answer, RowError) else answer for answer in answers]

    @property
    def _share(self) -> bool:
        """Whether the questions of a clip can go on from one pass over the video."""
        return not self.method.query_aware or self.method.retention_ratio == 1

    def _answer(self, clip: Clip, question: Question, stats: PruneStats, clock: PhaseClock) -> Answer:
        options = question.options
        right = question.right_option
        prompt = self.prompts.build(question, clip.placeholders)
        clock.expect("prefill" if clip.share else "generate")
        generated, choice = 0, None
        if options and self.choice_scoring != "generate":
            choice = self._most_likely(clip, prompt, options)
            prediction = options[choice]
        else:
            new_ids = clip.generate(prompt, self.config.answer.max_new_tokens)
            generated = len(new_ids)
            prediction = self.loaded.tokenizer.decode(new_ids, skip_special_tokens=True).strip()
            choice = parse_choice(prediction, options) if options else None
        clock("generate")
        seconds = clock.take()
        record = self._check(stats)
        return Answer(
            prediction=prediction,
            choice=choice,
            correct=_is_correct(question, prediction, choice, right),
            visual_tokens_full=record.visual_tokens,
            visual_tokens_kept=record.mean_kept,
            visual_tokens_stages=record.stages,
            prompt_tokens=len(prompt.ids) - record.visual_tokens,
            generated_tokens=generated,
            seconds_vision=seconds["vision"],
            seconds_selection=seconds["selection"],
            seconds_prefill=seconds["prefill"],
            seconds_generate=seconds["generate"],
            peak_memory_bytes=_peak_memory(self.loaded.device),
        )

    def _most_likely(self, clip: Clip, prompt: Prompt, options: Sequence[str]) -> int:
        """Index of the option that the model is most likely to answer with.

        The text of an option scores the log-probability of its tokens and of the end of the turn, added up: that of
        this answer and no longer one. It is not divided by the length, as the scores of whole answers compare by
        themselves. A letter scores without the end of the turn, as more may follow it ("B. red").
        """
        letters = self.choice_scoring == "likelihood-letter"
        texts = LETTERS[: len(options)] if letters else options
        answers = [self.prompts.answer_ids(prompt, text, end=not letters) for text in texts]
        return int(clip.log_likelihoods(prompt, answers).argmax())

    def _check(self, stats: PruneStats) -> PrefillRecord:
        """The record of the pass over this clip; a run that did not prune must not go into an output as if it had."""
        self.record = record = stats.last
        ratio = self.method.retention_ratio
        if record is None:
            raise RuntimeError(f"{self.method.describe()} saw no visual tokens; nothing was pruned")
        if record.retention >= 1 and (1 - ratio) * record.visual_tokens >= 1:
            raise RuntimeError(f"{self.method.describe()} kept all {record.visual_tokens} visual tokens")
        return record


def model_inputs(loaded: LoadedModel, video: DecodedVideo) -> ModelInputs:
    """The video's frames as the model takes them, on its device."""
    frames = torch.from_numpy(video.frames).to(loaded.device)
    return loaded.frame_processor.to_model_inputs(frames, video.times, loaded.dtype)


class Clip:
    """A clip on the model's device, inside the pruning context, and the cache of what its prompts have in common.

    Args:
        share: whether prompts may go on from one pass over the video.
    """

    def __init__(
        self, loaded: LoadedModel, video: DecodedVideo, *, share: bool, pixels: ModelInputs | None = None
    ) -> None:
        self.model, self.share = loaded.model, share
        self.inputs = model_inputs(loaded, video) if pixels is None else pixels
        self.placeholders = loaded.frame_processor.placeholders(self.inputs, video.times)
        self._family = family_of(loaded.model)
        self._takes_types = "mm_token_type_ids" in inspect.signature(loaded.model.forward).parameters
        self._shared: tuple[tuple[int, ...], Cache] | None = None

    def log_likelihoods(self, prompt: Prompt, answers: Sequence[Sequence[int]]) -> Tensor:
        """(n,) log-probability of each of n answers (token ids) to the prompt."""
        inputs = self._prompt_inputs(prompt)
        positions = inputs["position_ids"]
        inputs["position_ids"] = positions[..., -inputs["input_ids"].shape[1] :]
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        ids = [torch.tensor(answer, device=self.model.device) for answer in answers]
        targets = pad_sequence(ids, batch_first=True, padding_value=-1)  # (n, L)
        logits = output.logits.expand(len(answers), -1, -1)  # of the first token of each answer
        if targets.shape[1] > 1:
            cache = output.past_key_values
            cache.batch_repeat_interleave(len(answers))
            # Padding is at the right, where no token that counts can see it; its log-probabilities are left out below.
            later = self.model(
                input_ids=targets[:, :-1].clamp(min=0),
                past_key_values=cache,
                position_ids=_positions_after(positions, targets.shape[1] - 1),
                use_cache=True,
            ).logits
            logits = torch.cat((logits, later), dim=1)  # (n, L, vocabulary)
        logits = require_numbers(logits.float())
        log_probabilities = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
        return log_probabilities.masked_fill(targets < 0, 0).sum(dim=1)

    def generate(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """Greedy continuation of the prompt; the checkpoint's penalty for repetition applies."""
        inputs = self._prompt_inputs(prompt)
        given = inputs["input_ids"].shape[1]
        penalty = RepetitionPenalty(self.model.generation_config.repetition_penalty, prompt.ids[:-given])
        output = self.model.generate(
            **inputs,
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long, device=self.model.device),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([penalty]),
            **GREEDY,
        )
        return output[0, given:].tolist()

    def _prompt_inputs(self, prompt: Prompt) -> dict[str, Any]:
        """What `generate` needs to read a prompt: all of it, or the cached pass over the video and what follows.

        The positions are those of the whole prompt, as some models don't count on rightly from a cached video.
        """
        inputs = self._visual_inputs(prompt.ids)
        inputs["position_ids"] = self._family.position_ids(inputs)
        if not self.share:
            return inputs
        cut = prompt.prefix_length
        return {
            "past_key_values": copy.deepcopy(self._prefix(prompt.ids[:cut])),
            "input_ids": inputs["input_ids"][:, cut:],
            "position_ids": inputs["position_ids"],
        }

    def _prefix(self, ids: tuple[int, ...]) -> Cache:
        """The cache of the beginning of a prompt, the video included; the last one is kept."""
        if self._shared is None or self._shared[0] != ids:
            self._shared = None  # lets go of it before the next one is made
            output = self.model(**self._visual_inputs(ids), use_cache=True, logits_to_keep=1)
            self._shared = ids, output.past_key_values
        return self._shared[1]

    def _visual_inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        inputs = {"input_ids": torch.tensor([ids], device=self.model.device), **self.inputs}
        if self._takes_types:  # from these the families with M-RoPE know what is text (0) and what is video (2)
            inputs["mm_token_type_ids"] = 2 * self._family.placeholders(inputs["input_ids"]).int()
        return inputs


class RepetitionPenalty(LogitsProcessor):
    """A checkpoint's repetition penalty, over the whole prompt also when its beginning is in the cache."""

    def __init__(self, penalty: float | None, cached_ids: Sequence[int]) -> None:
        self.penalty = RepetitionPenaltyLogitsProcessor(float(penalty or 1.0))
        self.cached_ids = torch.tensor([cached_ids], dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cached = self.cached_ids.to(input_ids.device).expand(len(input_ids), -1)
        return self.penalty(torch.cat((cached, input_ids), dim=1), require_numbers(scores))


class PhaseClock:
    """Adds up seconds by phase, from the labels that `prune` calls it with when a phase ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.expect("generate")

    def expect(self, first_step: str) -> None:
        """Go on from now; the next forward without pixels ("step") is the phase `first_step`, later ones generate."""
        self._step, self._last = first_step, self._now()

    def __call__(self, label: str) -> None:
        if label == "step":
            label, self._step = self._step, "generate"
        now = self._now()
        self.seconds[label] += now - self._last
        self._last = now

    def take(self) -> Mapping[str, float]:
        """The seconds by phase since the last time."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def recommended(config: PruneConfig, loaded: LoadedModel) -> PruneConfig:
    """The configuration; with `calibrated`, that of the method that the model's profile recommends.

    Raises:
        ConfigError: there is no profile beside the model, or it recommends no method.
    """
    if config.method != CALIBRATED:
        return config
    try:
        choice = find_profile(loaded.model, f"--method {CALIBRATED}").choice
    except ProfileError as error:
        raise ConfigError(str(error)) from error
    if choice is None:
        raise ConfigError(
            f"--method {CALIBRATED}: the profile beside {loaded.name} recommends no method; "
            f"make it again with {COMMAND}"
        )
    options = {**choice.preset.options, **config.method_options}
    return dataclasses.replace(config, method=choice.preset.method, method_options=options)


def build_method(config: PruneConfig) -> Method:
    """The pruning method that a configuration names.

    Raises:
        ConfigError: unknown method or option.
    """
    try:
        return get_method(config.method)(retention_ratio=config.keep_ratio, **config.method_options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--method {config.method}: {error}") from error


def require_numbers(scores: Tensor) -> Tensor:
    """The scores as they are.

    Raises:
        RowError: `not_a_number`; the best of such scores would be taken for an answer.
    """
    if scores.isnan().any():
        raise RowError("not_a_number", "the model's scores are not numbers; try --dtype bfloat16 or float32")
    return scores


def attempt(work: Callable[[], Result]) -> Result | RowError:
    """The result of `work`, or why this clip or question has none.

    The error comes without its traceback, whose frames would hold on to tensors.
    """
    try:
        return work()
    except RowError as error:
        failure = RowError(error.error_type, error.message)
    except torch.OutOfMemoryError as error:
        failure = RowError("out_of_memory", f"{str(error).splitlines()[0]} Use fewer frames or a lower --keep-ratio.")
    except (UnsupportedInputError, UnreachableBudgetError) as error:
        failure = RowError("cannot_prune", str(error))
    torch.cuda.empty_cache()
    return failure


def _positions_after(position_ids: Tensor, count: int) -> Tensor:
    """The `count` positions that follow the last of (..., 1, S), where all axes of a text position are equal."""
    return position_ids[..., -1:] + torch.arange(1, count + 1, device=position_ids.device)


def _is_correct(question: Question, prediction: str, choice: int | None, right: int | None) -> bool | None:
    if question.options:
        return None if right is None else choice == right
    return None if question.answer is None else same_answer(prediction, question.answer)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
