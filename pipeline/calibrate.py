"""Measures what goes with a model, without labels, and writes its profile.

Two things are measured: which key score marks the visual tokens that the model's text looks at, for published ViTCoP,
and which method with which settings changes the model's next token least at --keep-ratio. The profile goes beside the
model, where `--method vitcop --method-options key_score=profile` finds the first and `--method calibrated` the second.
Exits with 0 when it is written, 1 when the model or a video can't be used, and 2 when an argument is wrong.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from pipeline.config import AnswerConfig
from pipeline.errors import ConfigError, RowError
from pipeline.model.frames.base import Inputs
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.prefix import model_inputs
from pipeline.model.prompt import PromptBuilder, Question
from pipeline.video import VideoError, decode
from pipeline.video.sampling import Sampling
from vitcop import UnsupportedModelError, family_of
from vitcop.calibration import FILE_NAME, Profile, calibrate, report
from vitcop.calibration.choice import choose


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What is measured: for each video, the attention of `--question`'s text to the visual tokens before it, and how
    much pruning changes what the model would say next."""

    model: str
    """`embedded`, a folder or a hub id."""
    videos: tuple[Path, ...]
    """Video files; four or more, so that it can be told how far they agree."""
    question: tuple[str, ...] = ("What happens in the video?", "What is in the video?", "Describe the video.")
    """Asked about every video."""
    num_frames: int = 8
    """Frames of each video."""
    keep_ratio: float = 0.1
    """Fraction of visual tokens kept where methods are compared."""
    dtype: str = "auto"
    """Of the weights; `auto` is the checkpoint's."""
    device: str = "auto"
    """`auto` is the GPU, or the CPU when there is none."""
    output: Path | None = None
    """Where the profile is written; by default into the model's folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrates as the command line says; returns its exit code."""
    config = tyro.cli(CalibrateConfig, args=arguments, description=__doc__)
    try:
        profile = write_profile(config)
    except (ConfigError, RowError, VideoError, UnsupportedModelError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(profile))
    return 0


def write_profile(config: CalibrateConfig) -> Profile:
    """Measure the model's profile and write it.

    Raises:
        ConfigError, UnsupportedModelError: the model can't be loaded, or not be pruned.
        VideoError, RowError: a video or a question can't be used.
        ValueError, OSError: too few videos, or the file can't be written.
    """
    loaded = load_model(config.model, dtype=config.dtype, device=config.device)
    clips = [list(_clip_inputs(loaded, path, config)) for path in config.videos]
    profile = calibrate(loaded.model, clips, config.model)
    profile = dataclasses.replace(profile, choice=choose(loaded.model, clips, config.keep_ratio))
    profile.save(config.output or loaded.folder / FILE_NAME)
    return profile


def _clip_inputs(loaded: LoadedModel, path: Path, config: CalibrateConfig) -> Iterator[Inputs]:
    """The forward inputs of one prompt for each question about a video."""
    frames, placeholders = loaded.frame_processor, family_of(loaded.model).placeholders
    video = decode(path, Sampling(num_frames=config.num_frames), frames.frame_size)
    pixels = model_inputs(loaded, video)
    # The pixels are shared by all prompts on the video; only the text differs.
    prompts = PromptBuilder(
        loaded.tokenizer, AnswerConfig(), show_options=False, video=frames.video_text, visual_token=frames.visual_token
    )
    for text in config.question:
        prompt = prompts.build(Question(question=text), frames.placeholders(pixels, video.times))
        inputs = {"input_ids": torch.tensor([prompt.ids], device=loaded.device), **pixels}
        if "video_grid_thw" in pixels:  # models with M-RoPE are told what is text (0) and what is video (2)
            inputs["mm_token_type_ids"] = 2 * placeholders(inputs["input_ids"]).int()
        yield inputs
