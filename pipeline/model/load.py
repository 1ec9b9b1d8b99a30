"""Loading a checkpoint: weights, tokenizer with its chat template, and frame processor, from one folder.

A hub model is downloaded to its snapshot folder first, so the embedded model, a local folder and a hub id are loaded by
the same code. Only safetensors are read and no code from a checkpoint is run. torchvision is not needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.config import ChoiceScoring
from pipeline.embedded import MODEL_DIRS
from pipeline.errors import ConfigError
from pipeline.model.frames import FrameProcessor, load_frame_processor

EMBEDDED = "embedded"
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to answer, in eval mode on its device, with what turns frames and text into its inputs.

    Attributes:
        name: as it was asked for: `embedded`, a folder or a hub id.
        folder: the checkpoint's files.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    frame_processor: FrameProcessor

    @property
    def model_type(self) -> str:
        return self.model.config.model_type

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def default_scoring(self) -> ChoiceScoring:
        """See the function of that name."""
        return _scoring_in(self.name, self.folder / "config.json")

    @cached_property
    def revision(self) -> str:
        """See `model_revision`."""
        return self.folder.name if _local_folder(self.name) is None else folder_hash(self.folder)


def load_model(
    model: str = EMBEDDED,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    resize: Literal["decoder", "processor"] = "decoder",
) -> LoadedModel:
    """Load a video language model.

    Args:
        model: `embedded`, `embedded-long`, a local folder or a hub id.
        revision: branch, tag or commit; hub ids only.
        dtype: `auto` (as the checkpoint says) or the name of a torch type.
        device: `auto` (the GPU, or the CPU when there is none) or a torch device.
        attn_implementation: as transformers knows it; None is its own choice.
        resize: see `load_frame_processor`.

    Raises:
        ConfigError: anything that keeps the checkpoint from being loaded whole, with the value and what to do.
    """
    # Cheap checks first: device, attention and config before gigabytes of weights.
    target = _resolve_device(device)
    _check_attention(attn_implementation, target)
    folder = _checkpoint_folder(model, revision)
    config = _load_config(model, folder)
    tokenizer = _load_tokenizer(model, folder)
    frame_processor = load_frame_processor(folder, resize)
    network = _load_network(model, folder, config, dtype, attn_implementation)
    return LoadedModel(
        name=model,
        folder=folder,
        model=network.to(target),
        tokenizer=tokenizer,
        frame_processor=frame_processor,
    )


def model_revision(model: str, revision: str | None = None) -> str:
    """A model's version for the fingerprint of a run: a hub model's commit, or `sha256:...` of a folder's files.

    Reads a hub model's config only, so that it is cheap to call where the model won't be loaded.

    Raises:
        ConfigError: no such model.
    """
    folder = _local_folder(model, revision)
    return _config_file(model, revision).parent.name if folder is None else folder_hash(folder)


def default_scoring(model: str, revision: str | None = None) -> ChoiceScoring:
    """How the checkpoint says that it answers multiple choice; `generate` when it does not.

    Reads a hub model's config only.

    Raises:
        ConfigError: no such model, or its config.json names a way that is not known.
    """
    return _scoring_in(model, _config_file(model, revision))


def _scoring_in(model: str, config_file: Path) -> ChoiceScoring:
    try:
        scoring = json.loads(config_file.read_text(encoding="utf-8")).get("choice_scoring", "generate")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: {config_file} can't be read: {error}") from error
    known = get_args(ChoiceScoring)
    if scoring not in known:
        raise ConfigError(
            f"--model {model}: choice_scoring in {config_file} is {scoring!r}; it must be one of {', '.join(known)}"
        )
    return scoring


def _config_file(model: str, revision: str | None) -> Path:
    folder = _local_folder(model, revision)
    if folder is not None:
        return folder / "config.json"
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except (OSError, HFValidationError, EntryNotFoundError) as error:
        raise _unreachable(model, revision, error) from error


def folder_hash(folder: Path) -> str:
    """`sha256:` and a digest of the names and contents of a checkpoint's files; other files don't count."""
    total = hashlib.sha256()
    # Names count as well as contents; sorted, because folders list files in any order.
    for path in sorted(path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()[:40]}"


def _local_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder of a model that is on disk; None for a hub id."""
    folder = MODEL_DIRS.get(model, Path(model).expanduser())
    if not folder.is_dir():
        if model in MODEL_DIRS:
            raise ConfigError(
                f"--model {model}: its weights are not in {folder}; {folder.parent / 'README.md'} has the command that "
                "trains them, and --model takes the folder that it writes"
            )
        # Hub ids have one slash at most, so anything else can only be meant as a folder.
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise ConfigError(f"--model {model}: there is no such folder")
        return None
    if revision is not None:
        raise ConfigError(f"--revision {revision} goes with a hub model, but --model {model} is a local folder")
    return folder.resolve()


def _checkpoint_folder(model: str, revision: str | None) -> Path:
    """The folder with the checkpoint's files, downloaded when `model` is a hub id."""
    folder = _local_folder(model, revision)
    if folder is None:
        try:
            snapshot = snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(CHECKPOINT_FILES),
                # No sub-folders and no second copy of the weights in their authors' own format.
                ignore_patterns=["*/*", "consolidated*"],
            )
        except (OSError, HFValidationError, EntryNotFoundError) as error:
            raise _unreachable(model, revision, error) from error
        folder = Path(snapshot)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"--model {model}: no *.safetensors in {folder}. Other formats of weights are not read, as loading them "
            "can run code; convert them with save_pretrained of transformers"
        )
    return folder


def _unreachable(model: str, revision: str | None, error: Exception) -> ConfigError:
    at = f" at revision {revision}" if revision else ""
    own = ", ".join(MODEL_DIRS)
    return ConfigError(f"--model {model}{at} is neither {own}, nor a local folder, nor found on the hub: {error}")


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: not a torch device; use auto, cpu, cuda or cuda:N") from error
    gpus = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= gpus:
        raise ConfigError(f"--device {device}: this process sees {gpus} GPUs; use --device auto or cpu")
    return resolved


def _check_attention(attn_implementation: str | None, device: torch.device) -> None:
    if attn_implementation != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "--attn-implementation flash_attention_2 needs the package flash-attn: pip install '.[flash]', or use sdpa"
        )
    if device.type != "cuda":
        raise ConfigError(f"--attn-implementation flash_attention_2 needs a GPU, not {device}; use sdpa")


def _load_config(model: str, folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: {error}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(f"--model {model}: a model of type {config.model_type!r} does not read images or videos")
    return config


def _load_network(
    model: str, folder: Path, config: PretrainedConfig, dtype: str, attn_implementation: str | None
) -> PreTrainedModel:
    try:
        network, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"--model {model}: {error}") from error
    # transformers would fill missing weights with random numbers and only warn.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(f"--model {model}: the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    return network


def _load_tokenizer(model: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with the template for messages that hold a video.

    transformers reads chat_template.jinja with the tokenizer; older checkpoints keep the template for videos in
    chat_template.json, beside a text-only one in the tokenizer's settings.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: the tokenizer can't be loaded: {error}") from error
    older = folder / "chat_template.json"
    if older.is_file() and not (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"--model {model}: no chat template in {folder}; put the one the model was trained with in "
            "chat_template.jinja"
        )
    return tokenizer
