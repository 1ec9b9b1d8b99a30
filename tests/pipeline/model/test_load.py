"""Loading from a folder, from the hub's cache, and every way in which a checkpoint can be unfit."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.embedded import MODEL_DIR, MODEL_DIRS
from pipeline.errors import ConfigError
from pipeline.model.load import LoadedModel, folder_hash, load_model, model_revision
from tests.pipeline.model.tiny_models import FRAMES, save_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds org/tiny at `COMMIT`, and no network."""
    folder = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(checkpoint, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FRAMES)
def test_a_folder_is_loaded(family: str, tmp_path: Path) -> None:
    loaded = load_model(str(save_checkpoint(family, tmp_path)))
    assert loaded.model_type == family
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert not loaded.model.training
    assert loaded.tokenizer.chat_template is not None


def test_the_embedded_model_is_loaded_like_a_folder() -> None:
    loaded = load_model()
    assert (loaded.name, loaded.folder) == ("embedded", MODEL_DIR.resolve())
    assert loaded.model_type == "llava_onevision"
    assert loaded.revision == model_revision("embedded") == model_revision(str(MODEL_DIR))


def test_an_embedded_model_without_weights_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_DIRS, "embedded-long", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--model embedded-long: its weights are not in .*README"):
        load_model("embedded-long")


def test_a_hub_model_is_loaded_from_its_snapshot(hub: Path, checkpoint: Path) -> None:
    loaded = load_model("org/tiny")
    expected = load_file(checkpoint / "model.safetensors")
    assert loaded.revision == model_revision("org/tiny") == model_revision("org/tiny", "main") == COMMIT
    assert torch.equal(loaded.model.state_dict()["model.image_newline"], expected["image_newline"])


def test_a_model_that_is_not_on_the_hub_is_named(hub: Path) -> None:
    for load in (load_model, model_revision):
        with pytest.raises(ConfigError, match="--model org/other at revision v2 is neither"):
            load("org/other", revision="v2")


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "~/no/such", "a/b/c"])
def test_a_missing_folder_is_named(model: str) -> None:
    with pytest.raises(ConfigError, match=f"--model {model}: there is no such folder"):
        load_model(model)


def test_a_folder_has_no_revision(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--revision v2 goes with a hub model"):
        load_model(str(checkpoint), revision="v2")


def test_the_revision_of_a_folder_is_the_content_of_its_files(copy: Path) -> None:
    before = folder_hash(copy)
    (copy / "README.md").write_text("notes")
    assert folder_hash(copy) == before
    weights = load_file(copy / "model.safetensors")
    weights["image_newline"] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert folder_hash(copy) != before


def test_the_type_of_the_weights_can_be_chosen(checkpoint: Path) -> None:
    assert load_model(str(checkpoint), dtype="bfloat16").dtype == torch.bfloat16


def test_the_attention_implementation_can_be_chosen(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), attn_implementation="eager")
    assert loaded.model.config.text_config._attn_implementation == "eager"


def test_other_formats_of_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert_refused(copy, r"no \*\.safetensors in")


def test_damaged_weights_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(copy, "incomplete metadata")


def test_missing_weights_are_refused_rather_than_made_up(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["image_newline"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert_refused(copy, r"lacks 1 weights, such as model\.image_newline")


def test_an_unknown_model_type_is_refused(copy: Path) -> None:
    edit_config(copy, model_type="unheard_of")
    assert_refused(copy, "unheard_of")


def test_a_model_without_eyes_is_refused(copy: Path) -> None:
    edit_config(copy, model_type="bert")
    assert_refused(copy, "'bert' does not read images or videos")


def test_a_missing_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert_refused(copy, "config.json")


def test_a_missing_tokenizer_is_refused(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert_refused(copy, "tokenizer can't be loaded")


def test_a_missing_chat_template_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    assert_refused(copy, "no chat template in .*chat_template.jinja")


def test_an_older_checkpoints_template_is_read(copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "text only"}))
    assert load_model(str(copy)).tokenizer.chat_template == template


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "abacus"}, "--device abacus: not a torch device"),
        ({"device": "cuda:99"}, "--device cuda:99: this process sees"),
        ({"attn_implementation": "unheard_of"}, "unheard_of"),
    ],
)
def test_settings_that_cannot_be_met_are_named(checkpoint: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(str(checkpoint), **settings)


def test_a_gpu_that_is_not_there_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="--device cuda: this process sees 0 GPUs; use --device auto or cpu"):
        load_model(str(checkpoint), device="cuda")


def test_flash_attention_names_the_extra_and_the_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = [None, object()]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.pop(0) if name == "flash_attn" else None)
    for message in (r"pip install '\.\[flash\]'", "needs a GPU, not cpu"):
        with pytest.raises(ConfigError, match=message):
            load_model(str(checkpoint), device="cpu", attn_implementation="flash_attention_2")


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_model(str(folder))
    assert f"--model {folder}" in str(raised.value)


def test_what_was_loaded_is_described(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint))
    assert isinstance(loaded, LoadedModel)
    assert loaded.revision == folder_hash(checkpoint)
