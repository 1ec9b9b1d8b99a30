"""From uint8 frames to a video language model's visual inputs, without torchvision: one frame processor a family."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from pipeline.errors import ConfigError
from pipeline.model.frames.base import FrameProcessor, FrameSize, Inputs, Settings
from pipeline.model.frames.patched import PatchedFrames, Qwen3VLFrames, Qwen25VLFrames
from pipeline.model.frames.stacked import InternVLFrames, LlavaNextVideoFrames, LlavaOnevisionFrames, VideoLlavaFrames
from pipeline.video.size import SourceSize

__all__ = ["PROCESSORS", "FrameProcessor", "FrameSize", "load_frame_processor"]

PROCESSORS: dict[str, type[FrameProcessor]] = {
    "llava_onevision": LlavaOnevisionFrames,
    "llava_next_video": LlavaNextVideoFrames,
    "video_llava": VideoLlavaFrames,
    "internvl": InternVLFrames,
    "qwen2_vl": PatchedFrames,
    "qwen2_5_vl": Qwen25VLFrames,
    "qwen3_vl": Qwen3VLFrames,
}
PICTURES_ONLY = ("llava",)
"""Model types that `vitcop` can prune, but whose prompts hold single pictures: they can't be asked about a video."""


def load_frame_processor(folder: str | Path, resize: Literal["decoder", "processor"] = "decoder") -> FrameProcessor:
    """Read a checkpoint folder's config.json and its video processor's settings.

    Args:
        resize: "processor" leaves resizing to the checkpoint's own processor, which needs torchvision; frames are
            then decoded at the source's size.

    Raises:
        ConfigError: the model type is not supported, a file is missing, or torchvision is.
    """
    folder = Path(folder)
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type in PICTURES_ONLY:
        raise ConfigError(
            f"{folder}: {model_type!r} takes single pictures, no video; use one of {', '.join(PROCESSORS)}"
        )
    if model_type not in PROCESSORS:
        raise ConfigError(f"{folder}: frames for {model_type!r} are not supported, only for {', '.join(PROCESSORS)}")
    family = PROCESSORS[model_type]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # Checkpoints write down only some settings; the family's defaults fill the rest.
    processor = family.from_settings(config, {**family.defaults, **_video_settings(folder)})
    if resize == "decoder":
        return processor
    # Frames come at the source's size then, uncropped: the checkpoint's processor does both itself.
    own = _load_checkpoint_processor(folder)
    return replace(processor, frame_size=SourceSize(), crop=None, checkpoint_processor=own)


def _video_settings(folder: Path) -> Settings:
    """The video processor's settings, from where transformers looks for them, in its order."""
    processor = folder / "processor_config.json"
    if processor.is_file() and "video_processor" in (settings := _read_json(processor)):
        return settings["video_processor"]
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            return _read_json(folder / name)
    raise ConfigError(f"{folder}: neither video_preprocessor_config.json nor preprocessor_config.json is there")


def _read_json(path: Path) -> Settings:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _load_checkpoint_processor(folder: Path) -> Callable[..., Inputs]:
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError("--resize processor needs torchvision, which is not installed; use --resize decoder")
    from transformers import AutoVideoProcessor

    return AutoVideoProcessor.from_pretrained(folder, trust_remote_code=False)
