"""Clips and their questions on their way through one pruned model, many at a time.

Clips come in with `add`; every `step` does the next piece of work and says which clips are finished. Questions of
different clips are rows of the same forwards:

1. **read** a clip: the vision tower and the pass over the video, which its questions share;
2. **ask**: what follows the video in the prompts of several questions, in one forward; options are scored in one more;
3. **decode**: one token for every row that generates. Rows leave when they end, so long ones hold up nobody.

Asking comes before reading and reading before decoding, so the decode batch is kept full. How many rows are in flight
is limited by number and by the memory that their caches will need, which is known before any tensor is made. When
memory runs out all the same, half of the rows go back to wait and the limit is halved; what was answered stays. An
answer does not depend on what else is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from pipeline.config import AnswerConfig
from pipeline.errors import RowError
from pipeline.model.admission import RowLimit
from pipeline.model.answer import Answer, is_correct
from pipeline.model.clock import PhaseClock, peak_memory, reset_peak_memory
from pipeline.model.forms import Form, Forms, Scored
from pipeline.model.generation import NOT_A_NUMBER, AnswerRow, DecodeBatch, TokenChooser, row_seed
from pipeline.model.load import LoadedModel
from pipeline.model.prefix import ClipPrefix, ModelInputs, ReadPrompts, log_likelihoods, read_prompts
from pipeline.model.prompt import Prompt, PromptBuilder, Question
from pipeline.video import DecodedVideo
from vitcop import (
    Method,
    PrefillRecord,
    UnreachableBudgetError,
    UnsupportedInputError,
    VisionCache,
    prune,
)
from vitcop import select as select_rows

Ticket = TypeVar("Ticket", bound=Hashable)
Result = TypeVar("Result")


@dataclass(eq=False, kw_only=True)
class _Clip(Generic[Ticket]):
    """A clip that is being answered.

    Attributes:
        video, pixels: let go once the clip has been read.
        prefix: None until it has been read.
        answers: one for each question, as they come.
    """

    ticket: Ticket
    video: DecodedVideo | None
    questions: Sequence[Question]
    pixels: ModelInputs | None
    prefix: ClipPrefix | None = None
    answers: dict[int, Answer] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class _Asked(Generic[Ticket]):
    """A question that is being answered.

    Attributes:
        candidates: token ids of the answers to choose from; empty where a text is generated.
        rows: the samples being generated.
        seconds: by phase; what the questions of a clip share is the first one's.
    """

    clip: _Clip[Ticket]
    number: int
    form: Form
    prompt: Prompt
    candidates: list[list[int]]
    rows: list[AnswerRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def question(self) -> Question:
        return self.clip.questions[self.number]

    @property
    def prefix(self) -> ClipPrefix:
        assert self.clip.prefix is not None
        return self.clip.prefix


class Session(Generic[Ticket]):
    """Clips being answered together; a context, inside which the model is pruned.

    Args:
        limit: how many rows may be in flight.
        vision: shared by several sessions on one model, so that a clip goes through the vision tower once.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: Method,
        prompts: PromptBuilder,
        forms: Forms,
        config: AnswerConfig,
        limit: RowLimit,
        *,
        frame_chunk: int = 16,
        vision: VisionCache | None = None,
    ) -> None:
        self.loaded, self.method, self.prompts, self.forms = loaded, method, prompts, forms
        self.config, self.limit = config, limit
        self.clock = PhaseClock(loaded.device)
        self.record: PrefillRecord | None = None
        # One context for all clips: entered once, since hooks on the model are not put on by clip.
        self._pruning = prune(loaded.model, method, frame_chunk=frame_chunk, clock=self.clock, vision=vision)
        self._decoding = DecodeBatch(loaded.model, TokenChooser(loaded.model, loaded.tokenizer, config))
        # A clip goes from `_unread` to questions in `_waiting`, then to rows of `_decoding`.
        self._unread: deque[_Clip[Ticket]] = deque()
        self._waiting: deque[_Asked[Ticket]] = deque()
        # By `id(row)`: rows are mutable, so they have no hash of their own values.
        self._asked_by_row: dict[int, _Asked[Ticket]] = {}
        self._clips: list[_Clip[Ticket]] = []

    def __enter__(self) -> Self:
        self._pruning.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pruning.__exit__(kind, error, trace)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._clips)

    @property
    def has_room(self) -> bool:
        """Whether the questions of another clip could join those in flight soon."""
        in_flight = len(self._waiting) + len(self._decoding.rows) + sum(len(clip.questions) for clip in self._unread)
        return in_flight < self.limit.rows

    def add(
        self, ticket: Ticket, video: DecodedVideo, questions: Sequence[Question], pixels: ModelInputs | None = None
    ) -> None:
        """Take in a clip.

        Args:
            ticket: what `step` names it by.
            pixels: what `model_inputs` made of the video, where it is there already.
        """
        clip = _Clip(ticket=ticket, video=video, questions=questions, pixels=pixels)
        self._clips.append(clip)
        self._unread.append(clip)

    @torch.inference_mode()
    def step(self) -> list[tuple[Ticket, list[Answer]]]:
        """Do the next piece of work; returns the clips that are finished, each with an answer for each question."""
        reset_peak_memory(self.loaded.device)
        # Ask, else read, else decode: the order that keeps the decode batch full.
        if self._waiting and (chunk := self._next_chunk()):
            self._ask(chunk)
        elif self._unread and not self._waiting:
            self._read(self._unread.popleft())
        else:
            self._decode()
        # Clips whose last question has just got its answer, in the order in which they came.
        finished = [clip for clip in self._clips if len(clip.answers) == len(clip.questions)]
        self._clips = [clip for clip in self._clips if len(clip.answers) < len(clip.questions)]
        return [(clip.ticket, [clip.answers[number] for number in sorted(clip.answers)]) for clip in finished]

    # -- read -----------------------------------------------------------------------------------------------------

    def _read(self, clip: _Clip[Ticket]) -> None:
        self.clock.expect("prefill")
        outcome = self._attempt(partial(self._read_clip, clip))
        seconds = self.clock.take()  # also of a clip that failed: no other one pays for it
        if isinstance(outcome, RowError):
            # Rows in flight made way: the clip is the first to be read again.
            if outcome.error_type == "out_of_memory" and self._free_half():
                clip.prefix = None
                self._unread.appendleft(clip)
                return
            clip.answers = {number: Answer(error=outcome) for number in range(len(clip.questions))}
            return
        # Frames and pixels are not needed any more once the caches are there.
        clip.video = clip.pixels = None
        # The pass over the video is one for all questions; its seconds count for the first.
        if outcome:
            outcome[0].seconds = dict(seconds)
        self._waiting.extend(outcome)

    def _read_clip(self, clip: _Clip[Ticket]) -> list[_Asked[Ticket]]:
        """The clip's questions, ready to be asked; those that can't be have their answers already."""
        assert clip.video is not None
        # A method that looks at the question makes another cache for each one.
        share = not self.method.query_aware or self.method.retention_ratio == 1
        prefix = clip.prefix = ClipPrefix(self.loaded, clip.video, share=share, pixels=clip.pixels)
        # All prompts are built before the pass: a question that can't be asked costs no forward.
        asked = []
        for number, question in enumerate(clip.questions):
            outcome = self._attempt(partial(self._prepare, clip, prefix, number, question))
            if isinstance(outcome, RowError):
                clip.answers[number] = Answer(error=outcome)
            else:
                asked.append(outcome)
        for each in asked:
            prefix.read(each.prompt)
        return asked

    def _prepare(self, clip: _Clip[Ticket], prefix: ClipPrefix, number: int, question: Question) -> _Asked[Ticket]:
        form = self.forms.of(question)
        _ = question.right_option  # an answer that is none of the options is an error, whatever the model says
        prompt = self.prompts.build(question, prefix.placeholders)
        options = question.options or ()
        candidates = form.candidates(self.prompts, prompt, options) if isinstance(form, Scored) else []
        return _Asked(clip=clip, number=number, form=form, prompt=prompt, candidates=candidates)

    # -- ask ------------------------------------------------------------------------------------------------------

    def _next_chunk(self) -> list[_Asked[Ticket]]:
        """The questions that can be asked now; with nothing being decoded there is always one."""
        chunk: list[_Asked[Ticket]] = []
        rows = len(self._decoding.rows)
        # Bytes that the rows in flight will need at their ends, not what they hold now.
        memory = sum(self._row_bytes(self._asked_by_row[id(row)]) for row in self._decoding.rows)
        while self._waiting:
            asked = self._waiting[0]
            # Rows that the question becomes: one for each option, or for each sample.
            copies = max(len(asked.candidates), self.config.num_samples)
            rows, memory = rows + copies, memory + copies * self._row_bytes(asked)
            # With nothing decoded, or to be scored at once, a question does not wait for others to end.
            at_once = not chunk and (asked.candidates or not self._decoding.rows)
            if not at_once and not self.limit.allows(rows, memory):
                break
            chunk.append(self._waiting.popleft())
        return chunk

    def _row_bytes(self, asked: _Asked[Ticket]) -> int:
        """Bytes that the cache of one row of a question will have when it ends."""
        text = max(map(len, asked.candidates), default=self.config.max_new_tokens)
        if not asked.prefix.share:
            return self.limit.cache_bytes(len(asked.prompt.ids) + text)
        prefix = asked.prefix.prefix(asked.prompt)
        # Pruned layers hold fewer tokens, so the prefix is measured, and only text is counted by tokens.
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.layers)
        return held + self.limit.cache_bytes(len(asked.prompt.ids) - asked.prompt.prefix_length + text)

    def _ask(self, chunk: list[_Asked[Ticket]]) -> None:
        shared = chunk[0].prefix.share
        # Without a shared pass the prompts are read with their pixels, which counts as prefill by itself.
        self.clock.expect("prefill" if shared else "generate")
        outcome = self._attempt(partial(self._ask_together, chunk))
        if not isinstance(outcome, RowError):
            self._share_seconds(chunk)
            for asked in chunk:
                self._finish_asked(asked)
            return
        # Nothing of a failed forward stays: the rows begin anew, alone or in smaller groups.
        for asked in chunk:
            self._forget(asked)
        if outcome.error_type == "out_of_memory" and (len(chunk) > 1 or self._decoding.rows):
            # All together were too much: they wait, and go in smaller groups.
            self._free_half(at_most=max(1, len(chunk) // 2))
            self._waiting.extendleft(reversed(chunk))
        elif len(chunk) > 1:
            for asked in chunk:  # one of them is to blame
                self._ask([asked])
        else:
            self._answer(chunk[0], Answer(error=outcome))

    def _ask_together(self, chunk: list[_Asked[Ticket]]) -> None:
        """Read the prompts; score the options of those that have them, and let the others begin to generate."""
        # One row a prompt: (R, vocabulary) logits after each, and a cache of R rows.
        read = read_prompts([(asked.prefix, asked.prompt) for asked in chunk])
        scored = [number for number, asked in enumerate(chunk) if asked.candidates]
        if scored:
            some = self._rows_of(read, scored)
            self._score([chunk[number] for number in scored], some)
        generated = [number for number, asked in enumerate(chunk) if not asked.candidates]
        if generated:
            # A prompt's row stands there once for each sample, so that samples share one reading.
            copies = [number for number in generated for _ in range(self.config.num_samples)]
            for number in generated:
                asked = chunk[number]
                # Random numbers start from the question's id, so a row draws the same in every run and batch.
                name = asked.question.name or asked.prompt.ids
                asked.rows = [
                    AnswerRow(prompt_ids=asked.prompt.ids, seed=row_seed(self.config.seed, name, sample))
                    for sample in range(self.config.num_samples)
                ]
                self._asked_by_row |= {id(row): asked for row in asked.rows}
            some = self._rows_of(read, copies)
            self._decoding.add([row for number in generated for row in chunk[number].rows], some.cache, some.logits)

    @staticmethod
    def _rows_of(read: ReadPrompts, rows: list[int]) -> ReadPrompts:
        # All rows in their order: no copy of the cache is needed.
        if rows == list(range(len(read.logits))):
            return read
        return ReadPrompts(select_rows(read.cache, rows), read.logits[torch.tensor(rows, device=read.logits.device)])

    def _score(self, asked: list[_Asked[Ticket]], read: ReadPrompts) -> None:
        scores = log_likelihoods(self.loaded.model, read, [each.candidates for each in asked])
        # Read back together: the best candidate of each question, and whether its scores are numbers.
        verdicts = torch.stack([torch.stack((one.argmax(), one.isfinite().all().long())) for one in scores]).tolist()
        for each, (best, sound) in zip(asked, verdicts, strict=True):
            error = None if sound else RowError("not_a_number", NOT_A_NUMBER)
            each.rows = [AnswerRow(prompt_ids=(), choice=best, error=error)]

    # -- decode ---------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        self.clock.expect("generate")
        # One entry a row: a question with several samples pays for each of them.
        going = [self._asked_by_row[id(row)] for row in self._decoding.rows]
        outcome = self._attempt(self._decoding.step)
        # Half of the rows make way and the step is tried anew; a single row can't make way.
        if isinstance(outcome, RowError):
            if not self._free_half():
                for asked in dict.fromkeys(going):
                    self._answer(asked, Answer(error=outcome))
            return
        self._share_seconds(going)
        for asked in dict.fromkeys(self._asked_by_row[id(row)] for row in outcome):
            self._finish_asked(asked)

    def _free_half(self, at_most: int | None = None) -> bool:
        """Lower the limit, and send half of the rows that are decoded back to wait; False if there is nothing to free.

        Args:
            at_most: rows that may be in flight from now on, where that is less than half of those that are.
        """
        questions = list(dict.fromkeys(self._asked_by_row[id(row)] for row in self._decoding.rows))
        # The later half; the earlier questions are nearer to their end.
        back = questions[(len(questions) + 1) // 2 :]
        if at_most is None and len(questions) < 2:
            return False
        self.limit.lower(len(self._decoding.rows) // 2 if at_most is None else at_most)
        for asked in back:
            self._forget(asked)
        self._waiting.extendleft(reversed(back))
        return True

    def _forget(self, asked: _Asked[Ticket]) -> None:
        """Take a question's rows out of the decode batch; asked again, it begins anew."""
        self._decoding.drop(asked.rows)
        for row in asked.rows:
            self._asked_by_row.pop(id(row), None)
        asked.rows = []

    # -- answers --------------------------------------------------------------------------------------------------

    def _share_seconds(self, asked: Sequence[_Asked[Ticket]]) -> None:
        """Divide what the clock has counted among questions; one that has several rows stands there several times."""
        for phase, seconds in self.clock.take().items():
            for each in asked:
                each.seconds[phase] = each.seconds.get(phase, 0.0) + seconds / len(asked)

    def _finish_asked(self, asked: _Asked[Ticket]) -> None:
        """Give a question its answer once all of its rows have ended."""
        if not asked.rows or not all(row.ended for row in asked.rows):
            return
        # One bad sample makes the question an error: its samples are one answer.
        error = next((row.error for row in asked.rows if row.error is not None), None)
        answer = Answer(error=error) if error is not None else self._attempt(partial(self._read_answer, asked))
        self._answer(asked, Answer(error=answer) if isinstance(answer, RowError) else answer)

    def _read_answer(self, asked: _Asked[Ticket]) -> Answer:
        question, rows = asked.question, asked.rows
        readings = [asked.form.read(question, row) for row in rows]
        # The first sample is the prediction; the others are in the column `samples`.
        prediction, choice = readings[0]
        record = self._checked_record(asked.prefix)
        # Phases that this question had no part in are 0, not missing.
        seconds = asked.seconds
        return Answer(
            prediction=prediction,
            choice=choice,
            correct=is_correct(question, prediction, choice),
            samples=[text for text, _ in readings] if self.config.num_samples > 1 else None,
            visual_tokens_full=record.visual_tokens,
            visual_tokens_kept=record.mean_kept,
            visual_tokens_stages=record.stages,
            prompt_tokens=len(asked.prompt.ids) - record.visual_tokens,
            generated_tokens=sum(len(row.new_ids) for row in rows),
            seconds_vision=seconds.get("vision", 0.0),
            seconds_selection=seconds.get("selection", 0.0),
            seconds_prefill=seconds.get("prefill", 0.0),
            seconds_generate=seconds.get("generate", 0.0),
            peak_memory_bytes=peak_memory(self.loaded.device),
        )

    def _answer(self, asked: _Asked[Ticket], answer: Answer) -> None:
        self._forget(asked)
        asked.clip.answers[asked.number] = answer
        if len(asked.clip.answers) == len(asked.clip.questions):
            asked.clip.prefix = None  # its cache goes at once

    def _checked_record(self, prefix: ClipPrefix) -> PrefillRecord:
        """The record of the pass over a clip; a run that did not prune must not go into an output as if it had."""
        self.record = record = prefix.record
        ratio = self.method.retention_ratio
        if record is None:
            raise RuntimeError(f"{self.method.describe()} saw no visual tokens; nothing was pruned")
        if record.retention >= 1 and (1 - ratio) * record.visual_tokens >= 1:
            raise RuntimeError(f"{self.method.describe()} kept all {record.visual_tokens} visual tokens")
        return record

    @staticmethod
    def _attempt(work: Callable[[], Result]) -> Result | RowError:
        """The result of `work`, or why there is none.

        The error comes without its traceback, whose frames would hold on to tensors.
        """
        try:
            return work()
        except RowError as error:
            failure = RowError(error.error_type, error.message)
        except torch.OutOfMemoryError as error:
            message = f"{str(error).splitlines()[0]} Use fewer frames or a lower --keep-ratio."
            failure = RowError("out_of_memory", message)
        except (UnsupportedInputError, UnreachableBudgetError) as error:
            failure = RowError("cannot_prune", str(error))
        torch.cuda.empty_cache()
        return failure
