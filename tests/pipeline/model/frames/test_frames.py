"""Frames as models take them, against transformers' video processors and worked examples."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PretrainedConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

import vitcop.families
from pipeline.embedded import MODEL_DIR
from pipeline.errors import ConfigError
from pipeline.model.frames import PICTURES_ONLY, PROCESSORS, FrameProcessor, load_frame_processor
from pipeline.model.frames.stacked import StackedFrames
from pipeline.video.size import FixedSize, QwenFrameSize, ShortestEdge

ROOT = Path(__file__).parents[4]
RECORDED_FRAMES = ROOT / "tests" / "data" / "frames.npz"
FULL_RECORDING = ROOT.parent / "shared" / "reference" / "hf_video_processors.npz"
RECORDED = {"qwen2_vl": "qwen2_vl", "qwen3_vl": "qwen3_vl"} | dict.fromkeys(
    ["llava_onevision", "llava_next_video", "video_llava", "internvl"], "stacked"
)
"""The recording in `RECORDED_FRAMES` of each family; one stands for all families whose frames stay pictures."""
QWEN3_SETTINGS = {
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "size": {"shortest_edge": 4096, "longest_edge": 10**6},
}


def build(model_type: str, side: int = 56, **settings: Any) -> FrameProcessor:
    """A processor from the family's defaults, for pictures of one size where the family has one."""
    config = CONFIG_MAPPING[model_type]()
    if issubclass(PROCESSORS[model_type], StackedFrames):
        config.vision_config.image_size = side
        settings = {"size": {"height": side, "width": side}, "crop_size": {"height": side, "width": side}} | settings
    return PROCESSORS[model_type].from_settings(config, {**PROCESSORS[model_type].defaults, **settings})


def ramp(*shape: int) -> torch.Tensor:
    return (torch.arange(int(np.prod(shape))) % 256).to(torch.uint8).reshape(shape)


def recorded(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """What transformers made of frames: `frames`, `pixel_values_videos` and, where patches are flat, the grid."""
    with np.load(path) as file:
        return {key.rpartition("/")[2]: torch.from_numpy(file[key]) for key in file if key.startswith(prefix)}


def assert_equal_to(case: dict[str, torch.Tensor], model_type: str) -> None:
    inputs = build(model_type).to_model_inputs(case["frames"])
    pixels = inputs["pixel_values"][None] if model_type == "internvl" else inputs["pixel_values_videos"]
    torch.testing.assert_close(pixels, case["pixel_values_videos"], atol=1e-6, rtol=0)
    assert ("video_grid_thw" in inputs) == ("video_grid_thw" in case)
    if "video_grid_thw" in case:
        assert torch.equal(inputs["video_grid_thw"], case["video_grid_thw"])


@pytest.mark.parametrize("model_type", RECORDED)
def test_equal_to_transformers_on_frames_of_the_models_size(model_type: str) -> None:
    assert_equal_to(recorded(RECORDED_FRAMES, f"{RECORDED[model_type]}/"), model_type)


@pytest.mark.skipif(not FULL_RECORDING.is_file(), reason="the full recording is not beside the checkout")
@pytest.mark.parametrize("model_type", RECORDED)
def test_equal_to_the_full_recording(model_type: str) -> None:
    assert_equal_to(recorded(FULL_RECORDING, f"{model_type}/model_size/"), model_type)


def test_pixels_are_rescaled_and_normalised_by_channel() -> None:
    processor = build("llava_onevision", side=28, image_mean=[0.5, 0.2, 0.0], image_std=[0.5, 0.25, 1.0])
    frames = torch.zeros(1, 28, 28, 3, dtype=torch.uint8)
    frames[0, 3, 5] = torch.tensor([255, 51, 102])
    pixels = processor.to_model_inputs(frames)["pixel_values_videos"]
    assert pixels.shape == (1, 1, 3, 28, 28)
    torch.testing.assert_close(pixels[0, 0, :, 3, 5], torch.tensor([1.0, 0.0, 0.4]))
    torch.testing.assert_close(pixels[0, 0, :, 0, 0], torch.tensor([-1.0, -0.8, 0.0]))


def test_normalising_and_rescaling_can_be_off() -> None:
    frames = ramp(2, 28, 28, 3)
    raw = build("llava_onevision", side=28, do_rescale=False, do_normalize=False).to_model_inputs(frames)
    assert torch.equal(raw["pixel_values_videos"][0].permute(0, 2, 3, 1), frames.float())
    scaled = build("llava_onevision", side=28, do_normalize=False).to_model_inputs(frames)
    torch.testing.assert_close(scaled["pixel_values_videos"], raw["pixel_values_videos"] / 255)


def test_patches_are_laid_out_by_merged_tokens() -> None:
    settings = QWEN3_SETTINGS | {"do_rescale": False, "do_normalize": False}
    processor = build("qwen3_vl", patch_size=1, merge_size=2, temporal_patch_size=2, **settings)
    frames = ramp(3, 2, 4, 3)  # 3 frames of 2x4 pixels
    inputs = processor.to_model_inputs(frames)
    assert inputs["video_grid_thw"].tolist() == [[2, 2, 4]]
    patches = inputs["pixel_values_videos"]
    # One row a pixel, in it red of both frames, then green, then blue; the rows of a 2x2 block stand together.
    assert patches.shape == (16, 6)
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    for row, (y, x) in enumerate(places):
        assert patches[row].tolist() == frames[0:2, y, x].T.flatten().tolist()
        assert patches[8 + row].tolist() == frames[[2, 2], y, x].T.flatten().tolist()  # the last frame fills up


def test_pixels_take_the_asked_type() -> None:
    for model_type in ("llava_onevision", "internvl", "qwen2_vl"):
        inputs = build(model_type).to_model_inputs(ramp(2, 56, 56, 3), dtype=torch.bfloat16)
        assert next(iter(inputs.values())).dtype == torch.bfloat16


def test_the_middle_is_cut_out_and_short_sides_are_padded() -> None:
    settings = {"do_rescale": False, "do_normalize": False}
    processor = build("video_llava", side=28, **settings)
    frames = ramp(1, 28, 51, 3)
    cut = processor.to_model_inputs(frames)["pixel_values_videos"][0, 0].permute(1, 2, 0)
    assert torch.equal(cut, frames[0, :, 11:39].float())
    narrow = ramp(1, 28, 25, 3)
    padded = processor.to_model_inputs(narrow)["pixel_values_videos"][0, 0].permute(1, 2, 0)
    assert torch.equal(padded[:, 1:26], narrow[0].float())
    assert padded[:, [0, 26, 27]].abs().sum() == 0


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (torch.zeros(2, 56, 56, 3), "float32"),
        (torch.zeros(56, 56, 3, dtype=torch.uint8), r"\(56, 56, 3\)"),
        (torch.zeros(0, 56, 56, 3, dtype=torch.uint8), r"\(0, 56, 56, 3\)"),
        (torch.zeros(2, 55, 56, 3, dtype=torch.uint8), "55x56"),
    ],
)
@pytest.mark.parametrize("model_type", ["llava_onevision", "qwen2_vl"])
def test_frames_that_do_not_fit_are_refused(model_type: str, frames: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build(model_type).to_model_inputs(frames)


@pytest.mark.parametrize(
    ("model_type", "frames", "placeholders"),
    [
        ("llava_onevision", (3, 56, 56, 3), "<video>" * (3 * 4 + 1)),  # 4x4 patches, pooled to 2x2, and a newline
        ("llava_next_video", (3, 56, 56, 3), "<video>" * (3 * 4)),
        ("video_llava", (3, 56, 56, 3), "<video>" * (3 * 17)),  # 4x4 patches and CLS
        ("qwen2_vl", (3, 56, 84, 3), "<|video_pad|>" * (2 * 2 * 3)),
        ("qwen2_5_vl", (3, 56, 84, 3), "<|video_pad|>" * (2 * 2 * 3)),
    ],
)
def test_placeholders(model_type: str, frames: tuple[int, ...], placeholders: str) -> None:
    processor = build(model_type)
    inputs = processor.to_model_inputs(ramp(*frames), times=[0.0, 0.5, 1.0])
    assert processor.placeholders(inputs, times=[0.0, 0.5, 1.0]) == placeholders
    assert processor.num_visual_tokens(inputs) == placeholders.count(processor.visual_token)


def test_odd_grids_are_pooled_up() -> None:
    processor = build("llava_onevision", side=70)  # 5x5 patches, pooled to 3x3
    assert processor.num_visual_tokens(processor.to_model_inputs(ramp(2, 70, 70, 3))) == 2 * 9 + 1


def test_internvl_names_its_frames() -> None:
    processor = build("internvl")
    inputs = processor.to_model_inputs(ramp(2, 56, 56, 3))
    assert list(inputs) == ["pixel_values"]
    tokens = "<IMG_CONTEXT>" * 4
    assert processor.placeholders(inputs) == f"Frame1: <img>{tokens}</img>\nFrame2: <img>{tokens}</img>"
    assert processor.num_visual_tokens(inputs) == 8


def test_qwen3_writes_the_mean_time_of_each_pair_of_frames() -> None:
    processor = build("qwen3_vl")
    times = [0.0, 1.0, 2.26, 4.3, 8.0]
    inputs = processor.to_model_inputs(ramp(5, 32, 64, 3), times)
    block = f"<|vision_start|>{'<|video_pad|>' * 2}<|vision_end|>"
    assert processor.placeholders(inputs, times) == "".join(f"<{s} seconds>{block}" for s in ("0.5", "3.3", "8.0"))
    assert processor.video_text == "<|vision_start|><|video_pad|><|vision_end|>"
    with pytest.raises(ValueError, match="times"):
        processor.placeholders(inputs)


def test_qwen2_5_is_told_the_seconds_between_temporal_patches() -> None:
    processor, frames = build("qwen2_5_vl"), ramp(5, 56, 56, 3)
    assert processor.to_model_inputs(frames, times=[1.0, 1.5, 2.0, 2.5, 3.0])["second_per_grid_ts"] == [1.0]
    with pytest.raises(ValueError, match="qwen2_5_vl places frames in time"):
        processor.to_model_inputs(frames)
    assert "second_per_grid_ts" not in build("qwen2_vl").to_model_inputs(frames)


def tiny_model(model_type: str) -> tuple[torch.nn.Module, PretrainedConfig]:
    """The smallest model whose vision side has the family's parts: 4x4 patches a frame."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = vision | {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
    clip = vision | {"image_size": 56, "patch_size": 14, "projection_dim": 16}
    match model_type:
        case "video_llava":
            video_llava = VideoLlavaConfig(
                vision_config=clip, text_config=text, image_token_index=1, video_token_index=2
            )
            return VideoLlavaForConditionalGeneration(video_llava).eval(), video_llava
        case "llava_next_video":
            next_video = LlavaNextVideoConfig(
                vision_config=clip, text_config=text, image_token_index=1, video_token_index=2
            )
            return LlavaNextVideoForConditionalGeneration(next_video).eval(), next_video
    internvl = InternVLConfig(
        vision_config=vision | {"image_size": [56, 56], "patch_size": [14, 14]}, text_config=text, image_token_id=1
    )
    return InternVLForConditionalGeneration(internvl).eval(), internvl


@pytest.mark.parametrize("model_type", ["video_llava", "llava_next_video", "internvl"])
def test_models_make_as_many_features_as_there_are_placeholders(model_type: str) -> None:
    model, config = tiny_model(model_type)
    settings = {"size": {"height": 56, "width": 56}, "do_center_crop": False}
    family = PROCESSORS[model_type]
    processor = family.from_settings(config, {**family.defaults, **settings})
    inputs = processor.to_model_inputs(ramp(3, 56, 56, 3))
    count = processor.num_visual_tokens(inputs)
    visual = config.image_token_id if model_type == "internvl" else config.video_token_id
    with torch.no_grad():
        for wrong, allowed in ((0, True), (1, False)):
            ids = torch.tensor([[5, *[visual] * (count - wrong), 6]])
            if allowed:
                assert model(input_ids=ids, **inputs).logits.shape[1] == count + 2
            else:
                with pytest.raises(ValueError, match=r"do(es)? not match"):
                    model(input_ids=ids, **inputs)


def save(folder: Path, model_type: str, files: dict[str, Any]) -> Path:
    CONFIG_MAPPING[model_type]().save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_settings_are_found_where_transformers_looks(tmp_path: Path) -> None:
    def settings(side: int) -> dict[str, Any]:
        return {"size": {"height": side, "width": side}}

    files: dict[str, Any] = {"preprocessor_config.json": settings(1)}
    assert load_frame_processor(save(tmp_path, "llava_onevision", files)).frame_size == FixedSize(1, 1)
    files["video_preprocessor_config.json"] = settings(2)
    assert load_frame_processor(save(tmp_path, "llava_onevision", files)).frame_size == FixedSize(2, 2)
    files["processor_config.json"] = {"num_image_tokens": 729}
    assert load_frame_processor(save(tmp_path, "llava_onevision", files)).frame_size == FixedSize(2, 2)
    files["processor_config.json"] = {"video_processor": settings(3)}
    assert load_frame_processor(save(tmp_path, "llava_onevision", files)).frame_size == FixedSize(3, 3)


def test_settings_of_older_and_newer_checkpoints(tmp_path: Path) -> None:
    older = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    newer = older | {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    for settings in (older, newer):
        processor = load_frame_processor(save(tmp_path, "qwen2_5_vl", {"preprocessor_config.json": settings}))
        assert processor.frame_size == QwenFrameSize(
            factor=28, min_pixels=3136, max_pixels=12845056, temporal_patch_size=2
        )
    clip = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_center_crop": True}
    processor = load_frame_processor(save(tmp_path, "llava_next_video", {"preprocessor_config.json": clip}))
    assert (processor.frame_size, processor.crop) == (ShortestEdge(336), (336, 336))


def test_the_embedded_model() -> None:
    processor = load_frame_processor(MODEL_DIR)
    assert processor.frame_size(480, 640, 8) == (96, 96)
    inputs = processor.to_model_inputs(ramp(8, 96, 96, 3))
    assert inputs["pixel_values_videos"].shape == (1, 8, 3, 96, 96)
    assert processor.num_visual_tokens(inputs) == 8 * 36 + 1


def test_unsupported_models_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"'bert' are not supported, only for llava_onevision, .*qwen3_vl"):
        load_frame_processor(tmp_path)
    with pytest.raises(ConfigError, match="preprocessor_config"):
        load_frame_processor(save(tmp_path, "llava_onevision", {}))
    with pytest.raises(ConfigError, match="nowhere"):
        load_frame_processor(tmp_path / "nowhere")


def test_the_checkpoints_own_processor_needs_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs torchvision"):
        load_frame_processor(MODEL_DIR, resize="processor")


def test_the_checkpoints_own_processor_gets_frames_of_the_sources_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(videos: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        assert options == {"do_sample_frames": False, "return_tensors": "pt"}
        return {"pixel_values_videos": torch.stack([video[..., :96, :96].float() for video in videos])}

    monkeypatch.setattr("pipeline.model.frames._load_checkpoint_processor", lambda folder: stand_in)
    processor = load_frame_processor(MODEL_DIR, resize="processor")
    assert processor.frame_size(100, 120, 2) == (100, 120)
    inputs = processor.to_model_inputs(ramp(2, 100, 120, 3))
    assert inputs["pixel_values_videos"].shape == (1, 2, 3, 96, 96)
    assert processor.num_visual_tokens(inputs) == 2 * 36 + 1


def test_the_pipeline_and_vitcop_know_the_same_families() -> None:
    assert set(PROCESSORS) | set(PICTURES_ONLY) == set(vitcop.families.FAMILIES)
    assert not set(PROCESSORS) & set(PICTURES_ONLY)


@pytest.mark.parametrize("model_type", PICTURES_ONLY)
def test_models_that_take_no_video_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{model_type}' takes single pictures, no video"):
        load_frame_processor(save(tmp_path, model_type, {}))
