"""What the workers of a sweep hold: one model, and every cell's way to prune it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from pipeline.cluster import OneByOne
from pipeline.config import FrameConfig, SweepJobConfig
from pipeline.decoding import TimedVideo, decode_samplings
from pipeline.manifest import Clip
from pipeline.model.answerer import answer_columns, exit_when_device_fails, questions_of
from pipeline.model.answering import VideoQA, build_method
from pipeline.model.load import load_model
from pipeline.model.prefix import model_inputs
from pipeline.output import Columns
from pipeline.sweep.cells import UNREACHABLE, Cell, cells_of
from vitcop import VisionCache


class SweepModel(OneByOne):
    """The model and the cells of a sweep.

    Args:
        share: whether the cells share a clip's vision features, which answers sooner but can't be timed.
        threads: CPU threads that the model may use.

    Raises:
        ConfigError: the model can't be loaded, or there is no such method.
    """

    def __init__(self, config: SweepJobConfig, share: bool, threads: int) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        self.config, self.share = config, share
        self.loaded = load_model(**dataclasses.asdict(config.model), resize=config.frames.resize)
        self.cells = cells_of(config.sweep)
        self.counts = sorted({cell.num_frames for cell in self.cells}, key=lambda count: count or 0)
        vision = VisionCache() if share else None
        self.models = {
            cell: VideoQA(self.loaded, build_method(cell.prune, self.loaded), config.answer, vision=vision)
            for cell in self.cells
        }

    @property
    def decode(self) -> Callable[[Clip], list[TimedVideo]]:
        """Decodes a clip at every frame count, in the order of `counts`."""
        return partial(decode_samplings, settings=self.frame_settings, size=self.loaded.frame_processor.frame_size)

    @property
    def frame_settings(self) -> list[FrameConfig]:
        frames = self.config.frames
        return [
            frames if count is None else dataclasses.replace(frames, num_frames=count, fps=None, max_frames=None)
            for count in self.counts
        ]

    def by_frames(self, videos: Sequence[TimedVideo]) -> Iterator[tuple[TimedVideo, list[Cell]]]:
        """Each decoded video with its cells."""
        for count, video in zip(self.counts, videos, strict=True):
            yield video, [cell for cell in self.cells if cell.num_frames == count]


class SweepAnswerer(SweepModel):
    """Answers all questions of a clip in every cell; the engine's `Answerer`."""

    @exit_when_device_fails()
    def answer(self, clip: Clip, videos: Sequence[TimedVideo]) -> list[list[Columns]]:
        """For each cell the answer columns of each of the clip's rows."""
        questions = questions_of(clip)
        columns: dict[Cell, list[Columns]] = {}
        for timed, cells in self.by_frames(videos):
            pixels = model_inputs(self.loaded, timed.video)
            for cell in cells:
                answers = self.models[cell].answer(timed.video, questions, pixels)
                columns[cell] = [_mark_unreachable(row) for row in answer_columns(timed, answers)]
        return [columns[cell] for cell in self.cells]


def _mark_unreachable(columns: Columns) -> Columns:
    """A ratio that a clip can't reach is no error to be tried again."""
    return columns | {"status": "unreachable"} if columns.get("error_type") == UNREACHABLE else columns
