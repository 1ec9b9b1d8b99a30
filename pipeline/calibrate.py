"""Calibration on videos: from files to the profile that is kept beside a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config import AnswerConfig
from pipeline.model.answering import model_inputs
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.prompt import PromptBuilder, Question
from pipeline.video import decode
from pipeline.video.sampling import Sampling
from vitcop import family_of
from vitcop.calibration import FILE_NAME, Profile, calibrate


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What is measured: for each video the attention of `--question`'s text to the visual tokens before it."""

    model: str
    """`embedded`, a folder or a hub id."""
    videos: tuple[Path, ...]
    """Video files; four or more, so that it can be told how far they agree."""
    question: tuple[str, ...] = ("What happens in the video?",)
    """Asked about every video."""
    num_frames: int = 8
    """Frames of each video."""
    dtype: str = "auto"
    """Of the weights; `auto` is the checkpoint's."""
    device: str = "auto"
    """`auto` is the GPU, or the CPU when there is none."""
    output: Path | None = None
    """Where the profile is written; by default into the model's folder."""


def write_profile(config: CalibrateConfig) -> Profile:
    """Measure the model's profile and write it.

    Raises:
        ConfigError, UnsupportedModelError: the model can't be loaded, or not be pruned.
        VideoError, RowError: a video or a question can't be used.
        ValueError, OSError: too few videos, or the file can't be written.
    """
    loaded = load_model(config.model, dtype=config.dtype, device=config.device)
    clips = (_clip_inputs(loaded, path, config) for path in config.videos)
    profile = calibrate(loaded.model, clips, config.model)
    profile.save(config.output or loaded.folder / FILE_NAME)
    return profile


def _clip_inputs(loaded: LoadedModel, path: Path, config: CalibrateConfig) -> Iterator[dict[str, Any]]:
    """The forward inputs of one prompt for each question about a video."""
    frames, placeholders = loaded.frame_processor, family_of(loaded.model).placeholders
    video = decode(path, Sampling(num_frames=config.num_frames), frames.frame_size)
    pixels = model_inputs(loaded, video)
    prompts = PromptBuilder(loaded.tokenizer, AnswerConfig(), video=frames.video_text, visual_token=frames.visual_token)
    for text in config.question:
        prompt = prompts.build(Question(question=text), frames.placeholders(pixels, video.times))
        inputs = {"input_ids": torch.tensor([prompt.ids], device=loaded.device), **pixels}
        if "video_grid_thw" in pixels:  # models with M-RoPE are told what is text (0) and what is video (2)
            inputs["mm_token_type_ids"] = 2 * placeholders(inputs["input_ids"]).int()
        yield inputs
