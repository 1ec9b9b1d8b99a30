"""Answers a second, with and without pruning and batching: `python -m benchmarks.throughput`.

A clip and what people ask about it, on a model of a real shape with random weights: one letter, eight questions with
one letter each, one caption, eight captions, and captions of several clips. Answered

- plain: `generate` of transformers on the unpruned model, one question after the other;
- plain batch: the same with all questions of a clip in one batch, each with its own copy of the video;
- single: this project's session with one row in flight;
- session: as the job runs it.

Variants take turns, figures are medians. Captions have exactly `--tokens` tokens. Beside each goal stands what was
reached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from transformers import AutoTokenizer

from benchmarks.common import alternate, machine, publish, seconds
from benchmarks.shapes import SHAPES, build_model, shape_numbers
from pipeline.config import AnswerConfig, PruneConfig
from pipeline.embedded import MODEL_DIR
from pipeline.model.admission import RowLimit
from pipeline.model.answering import VideoQA, build_method
from pipeline.model.clock import peak_memory, reset_peak_memory
from pipeline.model.frames.stacked import LlavaOnevisionFrames
from pipeline.model.load import LoadedModel
from pipeline.model.prefix import model_inputs
from pipeline.model.prompt import Question
from pipeline.video import DecodedVideo

LETTERS = tuple(
    Question(question=f"what color is object number {number} ?", options=("red", "green", "blue", "white"))
    for number in range(8)
)
CAPTIONS = tuple(Question(question=f"what moves after object number {number} ?") for number in range(8))


def load(shape: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A model of a real shape with random weights; words and chat template are the embedded model's."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = build_model(shape, device, dtype)
    model.config.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    frames = LlavaOnevisionFrames.from_settings(model.config, LlavaOnevisionFrames.defaults)
    return LoadedModel(name=shape, folder=Path(MODEL_DIR), model=model, tokenizer=tokenizer, frame_processor=frames)


def make_video(side: int, frames: int, seed: int) -> DecodedVideo:
    """Random pictures with the times of a clip of one frame a second."""
    pictures = np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    return DecodedVideo(
        frames=pictures,
        indices=np.arange(frames),
        timestamps=np.arange(frames, dtype=np.float64),
        start_time=0.0,
        fps=1.0,
        total_frames=frames,
        duration=float(frames),
        codec="h264",
        decoder="pyav",
        requested_frames=frames,
        lost=(),
        truncated=False,
    )


class Answering:
    """What the variants run on.

    Args:
        ratio: of visual tokens kept, in the variants that prune.
    """

    def __init__(self, loaded: LoadedModel, method: str, ratio: float, tokens: int) -> None:
        self.loaded, self.tokens = loaded, tokens
        config = AnswerConfig(choice_scoring="likelihood-letter", max_new_tokens=tokens, min_new_tokens=tokens)
        pruning = build_method(PruneConfig(method=method, keep_ratio=ratio))
        self.pruned = VideoQA(loaded, pruning, config)
        self.full = VideoQA(loaded, build_method(PruneConfig(method="none")), config)

    @torch.inference_mode()
    def plain(self, video: DecodedVideo, questions: Sequence[Question], batch: int) -> None:
        """`generate` of transformers, `batch` questions at a time, each with its own copy of the video."""
        pixels = model_inputs(self.loaded, video)
        placeholders = self.loaded.frame_processor.placeholders(pixels, video.times)
        for start in range(0, len(questions), batch):
            some = questions[start : start + batch]
            prompts = [list(self.full.prompts.build(question, placeholders).ids) for question in some]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=self.loaded.device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
            repeated = {name: value.repeat(len(some), *[1] * (value.dim() - 1)) for name, value in pixels.items()}
            new = 1 if some[0].options else self.tokens
            self.loaded.model.generate(
                input_ids=ids,
                attention_mask=mask.to(ids.device),
                **repeated,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )

    def session(self, videos: Sequence[DecodedVideo], questions: Sequence[Question], rows: int | None) -> None:
        """All questions about all videos through one session of this project."""
        with self.pruned.session(RowLimit(self.loaded, rows)) as session:
            for number, video in enumerate(videos):
                session.add(number, video, questions)
            while session.busy:
                for _, answers in session.step():
                    errors = [answer.error for answer in answers if answer.error is not None]
                    if errors:
                        raise RuntimeError(f"a question was not answered: {errors[0]}")


def measure(answering: Answering, options: Options) -> dict[str, dict[str, float]]:
    """Seconds of every workload in every variant: {workload: {variant: seconds}}."""
    side = answering.loaded.frame_processor.side  # type: ignore[attr-defined]
    videos = [make_video(side, options.frames, seed) for seed in range(options.clips)]
    device = answering.loaded.device
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    works = {
        "one letter": (LETTERS[:1], 1),
        "8 letters": (LETTERS, 1),
        "one caption": (CAPTIONS[:1], 1),
        "8 captions": (CAPTIONS, 1),
        f"{8 * options.clips} captions of {options.clips} clips": (CAPTIONS, options.clips),
    }
    for name, (questions, clips) in works.items():
        if clips == 1:
            runs[name, "plain"] = partial(answering.plain, videos[0], questions, 1)
            if len(questions) > 1 and options.plain_batch > 1:
                runs[name, "plain batch"] = partial(answering.plain, videos[0], questions, options.plain_batch)
        runs[name, "single"] = partial(answering.session, videos[:clips], questions, 1)
        runs[name, "session"] = partial(answering.session, videos[:clips], questions, options.batch_rows)
    timed = {"/".join(key): partial(seconds, run, device) for key, run in runs.items()}
    measured = alternate(timed, options.repeats, warm_up=options.warm_up)
    medians = {key: float(np.median(times)) for key, times in measured.items()}
    return {name: {variant: medians[f"{name}/{variant}"] for one, variant in runs if one == name} for name, _ in runs}


def goals(times: dict[str, dict[str, float]], clips: int) -> list[dict[str, Any]]:
    """What was aimed at beside what was reached; ratios of this one run."""
    many = f"{8 * clips} captions of {clips} clips"
    reached = {
        f"{8 * clips} caption rows, times one at a time (at least)": (
            times[many]["single"] / times[many]["session"],
            5.0,
        ),
        "8 captions of a clip, times plain (at least)": (
            times["8 captions"]["plain"] / times["8 captions"]["session"],
            12.0,
        ),
        "8 captions, of the time of one (at most)": (
            times["8 captions"]["session"] / times["one caption"]["session"],
            1.3,
        ),
        "8 one-letter questions, of the time of one (at most)": (
            times["8 letters"]["session"] / times["one letter"]["session"],
            1.15,
        ),
    }
    return [{"name": name, "reached": round(value, 3), "goal": goal} for name, (value, goal) in reached.items()]


ShapeName = Literal[tuple(shape for shape in SHAPES if "qwen" not in shape)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and on what."""

    shape: ShapeName = "llava-onevision-0.5b-thin"
    frames: int = 16
    tokens: int = 32
    """Of a caption."""
    clips: int = 2
    """Of the workload with several clips."""
    method: str = "vitcop"
    keep_ratio: float = 0.1
    batch_rows: int | None = None
    """Rows in flight. None: what the job takes."""
    plain_batch: int = 1
    """Questions that plain generate takes at once."""
    repeats: int = 1
    warm_up: int = 0
    threads: int = torch.get_num_threads()
    device: str = "cpu"
    """A torch device."""
    dtype: str = "float32"
    save: bool = False
    """Keep the result under benchmarks/results/."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line for each goal, and the result as JSON."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.throughput", description=__doc__)
    torch.set_num_threads(options.threads)
    loaded = load(options.shape, torch.device(options.device), getattr(torch, options.dtype))
    reset_peak_memory(loaded.device)
    times = measure(Answering(loaded, options.method, options.keep_ratio, options.tokens), options)
    reached = goals(times, options.clips)
    for goal in reached:
        print(f"{goal['name']}: {goal['reached']:.2f} (goal {goal['goal']:g})")
    settings = {
        name: str(value) for name, value in dataclasses.asdict(options).items() if name not in ("save", "device")
    }
    result = {
        "benchmark": "throughput",
        "machine": machine(loaded.device),
        "settings": settings,
        "shape": shape_numbers(loaded.model),
        "seconds": times,
        "peak_memory_bytes": peak_memory(loaded.device),
        "goals": reached,
    }
    publish("throughput", result, options.save)


if __name__ == "__main__":
    main()
