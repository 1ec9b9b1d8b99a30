"""The answerer of the main job's workers: one model, which answers all questions of a clip."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from pipeline.config import JobConfig
from pipeline.decoding import TimedVideo, decode_clip
from pipeline.manifest import Clip
from pipeline.model.admission import RowLimit
from pipeline.model.answer import Answer
from pipeline.model.answering import VideoQA, build_method
from pipeline.model.load import load_model
from pipeline.model.prompt import Question
from pipeline.output import Columns, error_columns


@contextmanager
def exit_when_device_fails() -> Iterator[None]:
    """Ends the worker: after an error on the device every later call fails, and a new process gets a sound one."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise SystemExit(f"the device failed: {error}") from error


def questions_of(clip: Clip) -> list[Question]:
    return [
        Question(
            question=row.question,
            options=row.options,
            answer=row.answer,
            answer_index=row.answer_index,
            columns=row.columns,
            name=row.sample_id,
        )
        for row in clip.rows
    ]


class ClipAnswerer:
    """Answers the questions of many clips at a time; the engine's `Answerer`.

    Args:
        threads: CPU threads that the model may use.

    Raises:
        ConfigError: the model can't be loaded or pruned as the configuration says.
    """

    def __init__(self, config: JobConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        loaded = load_model(**dataclasses.asdict(config.model), resize=config.frames.resize)
        method = build_method(config.prune, loaded)
        self.model = VideoQA(loaded, method, config.answer, frame_chunk=config.prune.frame_chunk)
        rows = None if config.run.batch_rows == "auto" else config.run.batch_rows
        self.limit = RowLimit(loaded, rows, config.run.memory_fraction)
        self.videos: dict[int, TimedVideo] = {}
        self._begin()

    def _begin(self) -> None:
        self.session = self.model.session(self.limit)
        self.session.__enter__()

    @property
    def decode(self) -> Callable[[Clip], TimedVideo]:
        return partial(decode_clip, frames=self.config.frames, size=self.model.frame_size)

    @property
    def rows_in_flight(self) -> int:
        return self.limit.rows

    @property
    def busy(self) -> bool:
        return self.session.busy

    @property
    def has_room(self) -> bool:
        return self.session.has_room

    def add(self, ticket: int, clip: Clip, video: TimedVideo) -> None:
        self.videos[ticket] = video.without_frames()
        self.session.add(ticket, video.video, questions_of(clip))

    @exit_when_device_fails()
    def step(self) -> list[tuple[int, list[Columns]]]:
        """The finished clips, each with the answer columns of its rows."""
        return [(ticket, answer_columns(self.videos.pop(ticket), answers)) for ticket, answers in self.session.step()]

    def clear(self) -> None:
        self.session.__exit__(None, None, None)
        self.videos.clear()
        self._begin()


def answer_columns(timed: TimedVideo, answers: Sequence[Answer]) -> list[Columns]:
    """The output columns of each answer, those of the clip's frames included. Decode time counts for the first row."""
    video = timed.video
    shared = {
        "num_frames": len(video.timestamps),
        "requested_frames": video.requested_frames,
        "lost_frames": list(video.lost),
        "timestamps": video.timestamps.tolist(),
        "decoder": video.decoder,
    }
    seconds = [timed.seconds] + [0.0] * (len(answers) - 1)
    return [
        shared | {"seconds_decode": decode} | _columns_of(answer)
        for answer, decode in zip(answers, seconds, strict=True)
    ]


def _columns_of(answer: Answer) -> Columns:
    if answer.error is not None:
        return error_columns(answer.error)
    columns = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer) if field.name != "error"}
    return columns | {"status": "ok", "visual_tokens_stages": list(answer.visual_tokens_stages.items())}
