"""`VideoQA`: one loaded model with one pruning method, which answers questions about clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipeline.config import CALIBRATED, AnswerConfig, PruneConfig
from pipeline.errors import ConfigError
from pipeline.model.admission import RowLimit
from pipeline.model.answer import Answer
from pipeline.model.forms import Forms
from pipeline.model.frames import FrameSize
from pipeline.model.load import LoadedModel
from pipeline.model.prefix import ModelInputs
from pipeline.model.prompt import PromptBuilder, Question
from pipeline.model.session import Session
from pipeline.video import DecodedVideo
from vitcop import Method, PrefillRecord, ProfileError, UnsupportedModelError, VisionCache, get_method, prune
from vitcop.calibration.profiles import COMMAND, find_profile


class VideoQA:
    """Answers questions about clips with one model and one pruning method.

    Args:
        frame_chunk: frames that go through the vision tower at once.
        vision: shared by several of these on one model, so that a clip goes through the vision tower once.

    Attributes:
        choice_scoring: how multiple choice is answered; with `auto` as the checkpoint says.
        record: what the pass over the last clip of `answer` kept and cost; None before there was one.

    Raises:
        ConfigError: the model can't be pruned, or its chat template can't be used.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: Method,
        config: AnswerConfig,
        *,
        frame_chunk: int = 16,
        vision: VisionCache | None = None,
    ) -> None:
        self.loaded, self.method, self.config = loaded, method, config
        self.frame_chunk, self.vision = frame_chunk, vision
        self.record: PrefillRecord | None = None
        try:
            prune(loaded.model, method)
        except UnsupportedModelError as error:
            raise ConfigError(f"--model {loaded.name}: {error}") from error
        asked = config.choice_scoring
        self.choice_scoring = loaded.default_scoring if asked == "auto" else asked
        self.forms = Forms(self.choice_scoring)
        frames = loaded.frame_processor
        self.prompts = PromptBuilder(
            loaded.tokenizer,
            config,
            show_options=self.forms.shows_options,
            video=frames.video_text,
            visual_token=frames.visual_token,
        )

    @property
    def frame_size(self) -> FrameSize:
        """The size at which the model takes frames: a picklable function that needs no torch, for the decoder."""
        return self.loaded.frame_processor.frame_size

    def session(self, limit: RowLimit) -> Session:
        """A session for many clips; one at a time on a model."""
        return Session(
            self.loaded,
            self.method,
            self.prompts,
            self.forms,
            self.config,
            limit,
            frame_chunk=self.frame_chunk,
            vision=self.vision,
        )

    def answer(
        self, video: DecodedVideo, questions: Sequence[Question], pixels: ModelInputs | None = None
    ) -> list[Answer]:
        """One answer for each question, in order. What can go wrong with a clip or a question is in `Answer.error`.

        The vision tower runs once. With a method that does not look at the question, so does the language model over
        the video. Answers equal those of separate runs.

        Args:
            pixels: what `model_inputs` made of the video, where several methods share it.
        """
        with self.session(RowLimit(self.loaded)) as session:
            session.add(None, video, questions, pixels)
            finished: list[list[Answer]] = []
            while not finished:
                finished = [answers for _, answers in session.step()]
            self.record = session.record or self.record
        return finished[0]


def build_method(config: PruneConfig, loaded: LoadedModel | None = None) -> Method:
    """The pruning method that a configuration names.

    Args:
        loaded: the model whose profile says what `calibrated` is.

    Raises:
        ConfigError: unknown method or option, or no method that a profile recommends.
    """
    if config.method == CALIBRATED and loaded is not None:
        config = _recommended(config, loaded)
    try:
        return get_method(config.method)(retention_ratio=config.keep_ratio, **config.method_options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--method {config.method}: {error}") from error


def _recommended(config: PruneConfig, loaded: LoadedModel) -> PruneConfig:
    """The method that the model's profile recommends, with the options that are given over its own."""
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
