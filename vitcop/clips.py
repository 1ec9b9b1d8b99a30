"""A clip as model inputs, for calibration: frames squeezed to the model's size, and a question after them.

Close to what a checkpoint's own processor makes, not equal: frames are neither cropped nor tiled, and stand one second
apart. Inputs made in another way can be given to `vitcop.calibrate.calibrate` directly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from vitcop.errors import UnsupportedInputError

STACKED = ("llava_onevision", "llava_next_video", "video_llava")
"""Families that take frames of one size, one behind the other."""
PATCHED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families that take patches of frames of any size."""
MOST_TOKENS = 256
"""Visual tokens of a frame, in families that take frames of any size."""


def read_frames(path: Path, count: int) -> np.ndarray:
    """`count` frames of a clip, evenly spread, uint8 (T, H, W, 3); all frames of a shorter one.

    Args:
        path: a video file (read with PyAV), or a .npy array of frames, or a .npz file with one called "frames".

    Raises:
        ValueError: no frames in it, or of another type or shape.
    """
    if path.suffix not in (".npy", ".npz"):
        return _decode(path, count)
    content = np.load(path)
    if path.suffix == ".npz" and "frames" not in content:
        raise ValueError(f"{path}: no array 'frames' in it, only {', '.join(content)}")
    frames = content["frames"] if path.suffix == ".npz" else content
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"{path}: frames must be (T, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    return frames[_spread(len(frames), count)]


def _decode(path: Path, count: int) -> np.ndarray:
    import av  # only video files need more than torch and transformers

    def pictures() -> Iterator[Any]:
        with av.open(str(path)) as container:
            yield from container.decode(video=0)

    try:
        total = sum(1 for _ in pictures())
        wanted = set(_spread(total, count).tolist())
        frames = [frame.to_ndarray(format="rgb24") for index, frame in enumerate(pictures()) if index in wanted]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a video that can be decoded ({error})") from error
    if not frames:
        raise ValueError(f"{path}: no frames in it")
    return np.stack(frames)


def _spread(total: int, count: int) -> np.ndarray:
    """Indices of `count` of `total` frames, evenly spread, both ends included."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


class ClipInputs:
    """Makes the forward inputs of one model.

    Args:
        prompt: text with `{video}` and `{question}` in it; by default the tokenizer's chat template.

    Raises:
        UnsupportedInputError: frames of this family are not prepared here.
        ValueError: neither a prompt nor a chat template, or no normalisation beside the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | None = None) -> None:
        if model.config.model_type not in STACKED + PATCHED:
            raise UnsupportedInputError(
                f"frames for {model.config.model_type} are not prepared here, only for {', '.join(STACKED + PATCHED)}; "
                "make the inputs with the model's own processor and call vitcop.calibrate.calibrate(model, clips)"
            )
        if prompt is None and tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; pass --prompt 'USER: {video} {question} ASSISTANT:'")
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt
        self.mean, self.std = _normalisation(model.config._name_or_path)
        self.token = tokenizer.convert_ids_to_tokens(model.config.video_token_id)
        # Qwen3-VL marks each slice by itself; the template's marks around the whole video go.
        self.video = f"<|vision_start|>{self.token}<|vision_end|>" if self._timestamps else self.token

    def __call__(self, frames: np.ndarray, questions: list[str]) -> list[dict[str, Any]]:
        """Inputs of one prompt for each question on the frames (T, H, W, 3)."""
        arrange = _stack if self.model.config.model_type in STACKED else _patch
        pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        visual = arrange(self.model.config.vision_config, pictures, self.mean, self.std)
        visual = {name: value.to(self.model.device) for name, value in visual.items()}
        visual["pixel_values_videos"] = visual["pixel_values_videos"].to(self.model.dtype)
        with torch.no_grad():
            features = self.model.model.get_video_features(**visual, return_dict=True).pooler_output
        placeholders = self._placeholders(sum(part.shape[:-1].numel() for part in features), len(frames))
        return [self._with_text(visual, placeholders, question) for question in questions]

    @property
    def _timestamps(self) -> bool:
        return self.model.config.model_type == "qwen3_vl"

    def _placeholders(self, count: int, frames: int) -> str:
        if not self._timestamps:
            return self.token * count
        step = self.model.config.vision_config.temporal_patch_size
        times = [(start + min(start + step, frames) - 1) / 2 for start in range(0, frames, step)]
        tokens = self.token * (count // len(times))
        return "".join(f"<{time:.1f} seconds><|vision_start|>{tokens}<|vision_end|>" for time in times)

    def _with_text(self, visual: dict[str, Tensor], placeholders: str, question: str) -> dict[str, Any]:
        if self.prompt is None:
            content = [{"type": "video"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = self.prompt.replace("{question}", question).replace("{video}", self.video)
        if text.count(self.video) != 1:
            raise ValueError(f"the prompt must hold {self.video} once for the video, got {text!r}")
        ids = self.tokenizer(text.replace(self.video, placeholders), return_tensors="pt").input_ids
        inputs = {"input_ids": ids.to(self.model.device), **visual}
        if "video_grid_thw" in visual:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.video_token_id).int() * 2
        return inputs


def _normalisation(model: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) of pixels in [0, 1], from the checkpoint's processor."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            settings = json.loads(Path(path).read_text())
            mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
            return mean, std
    raise ValueError(f"{model}: neither video_preprocessor_config.json nor preprocessor_config.json beside the model")


def _resize(pictures: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(pictures, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _stack(vision: Any, pictures: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Frames (T, 3, H, W) in [0, 1] -> pixels (1, T, 3, side, side)."""
    pictures = _resize(pictures, vision.image_size, vision.image_size)
    return {"pixel_values_videos": ((pictures - mean) / std)[None]}


def _patch(vision: Any, pictures: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Frames (T, 3, H, W) in [0, 1] -> patches (N, 3 * time * patch * patch), those of a merged token in a row."""
    time, patch, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    height, width = pictures.shape[-2:]
    scale = min(1.0, (MOST_TOKENS * (patch * merge) ** 2 / (height * width)) ** 0.5) / (patch * merge)
    rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
    pictures = (_resize(pictures, rows * patch * merge, columns * patch * merge) - mean) / std
    pictures = torch.cat((pictures, pictures[-1:].expand(-len(pictures) % time, -1, -1, -1)))  # fills the last slice
    slices = len(pictures) // time
    blocks = pictures.reshape(slices, time, 3, rows, merge, patch, columns, merge, patch)
    return {
        "pixel_values_videos": blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * time * patch * patch),
        "video_grid_thw": torch.tensor([[slices, rows * merge, columns * merge]]),
    }
