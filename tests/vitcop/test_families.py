"""Each family's visual side, against what its model itself computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    InternVLConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    VideoLlavaConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.vitcop.models import (
    IMAGE,
    SETUPS,
    TEXT,
    VIDEO,
    build,
    clip,
    internvl,
    llava_next_video,
    make_inputs,
)
from vitcop import UnsupportedInputError, UnsupportedModelError, ViTCoP, get_method, prune
from vitcop.families import FAMILIES, Family, family_of
from vitcop.families.base import Capture
from vitcop.tokens import VisualTokens
from vitcop.vision import join_frames

METHOD = ViTCoP(retention_ratio=0.5)
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
TOWERS = [name for name in SETUPS if name not in QWEN]


def encode(adapter: Family, inputs: dict[str, Tensor], frame_chunk: int = 32) -> VisualTokens:
    chunks = list(adapter.encode(inputs, adapter.geometry(inputs), METHOD.needs, frame_chunk))
    assert [chunk.first_frame for chunk in chunks] == [sum(c.frames for c in chunks[:i]) for i in range(len(chunks))]
    return join_frames(chunks)


@contextmanager
def language_inputs(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of the calls of the language model."""
    calls: list[dict[str, Any]] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    yield calls
    handle.remove()


# -- which models ------------------------------------------------------------------------------------------------------


def test_every_adapter_has_a_test_model() -> None:
    assert set(FAMILIES) == set(SETUPS)


def test_other_models_are_refused_with_the_list_of_families() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT))
    with pytest.raises(UnsupportedModelError) as error:
        prune(model, METHOD)
    assert all(adapter.label in str(error.value) for adapter in FAMILIES.values())
    with pytest.raises(UnsupportedModelError, match="Linear"):
        prune(nn.Linear(2, 2), METHOD)


def test_a_model_without_its_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="pass the whole model"):
        prune(build("llava_onevision").model, METHOD)


def test_other_vision_towers_are_refused() -> None:
    vision = PixtralVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), vision_feature_layer=-1)
    with pytest.raises(UnsupportedModelError, match="pixtral"):
        family_of(LlavaForConditionalGeneration(config))


def test_sliding_windows_are_refused() -> None:
    text = Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    config = LlavaConfig(vision_config=clip(4), text_config=text)
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        family_of(LlavaForConditionalGeneration(config))


@pytest.mark.parametrize("make", [llava_next_video, internvl])
def test_cls_in_a_pooled_grid_is_refused(make: Any) -> None:
    model = make()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match="full"):
        family_of(model)


# -- features ----------------------------------------------------------------------------------------------------------


def test_geometry(family: str) -> None:
    setup, adapter = SETUPS[family], family_of(build(family))
    geometry = adapter.geometry(make_inputs(family))
    assert (geometry.frames, geometry.tokens_per_frame) == (setup.frames, setup.per_frame)
    assert geometry.num_layers == TEXT["num_hidden_layers"]


RELEASED = {
    # placeholders of 8 frames (pictures) in the released checkpoints, whose vision configs are the defaults
    "llava_onevision": (LlavaOnevisionConfig, "pixel_values_videos", 8 * 14 * 14 + 1),
    "llava_next_video": (LlavaNextVideoConfig, "pixel_values_videos", 8 * 12 * 12),
    "video_llava": (VideoLlavaConfig, "pixel_values_videos", 2056),
    "llava": (LlavaConfig, "pixel_values", 8 * 576),
    "internvl": (InternVLConfig, "pixel_values", 8 * 256),
}


@pytest.mark.parametrize("family", RELEASED)
def test_released_shapes(family: str) -> None:
    kind, name, placeholders = RELEASED[family]
    model_class = type(build(family))
    vision = kind().vision_config
    vision.num_hidden_layers = 2
    with torch.device("meta"):
        model = model_class(kind(vision_config=vision, text_config=Qwen2Config(**TEXT)))
    adapter = family_of(model)
    pixels = torch.empty((1, 8, 3, 2, 2) if name == "pixel_values_videos" else (8, 3, 2, 2), device="meta")
    ids = torch.full((1, placeholders), model.config.image_token_id)
    geometry = adapter.geometry({"input_ids": ids, name: pixels})
    offsets = adapter.token_offsets(geometry)
    assert geometry.frames == 8
    assert len(offsets) == geometry.num_tokens
    fixed = {"llava_onevision": 1, "video_llava": 8}.get(family, 0)
    assert geometry.num_tokens == placeholders - fixed
    assert int(offsets[-1]) < placeholders


@pytest.mark.parametrize("frame_chunk", [1, 2, 3, 32])
def test_tokens_are_those_the_model_makes(family: str, frame_chunk: int) -> None:
    """Also where they stand among the placeholders, and those that are no visual tokens."""
    model, inputs = build(family), make_inputs(family, (5, 2))
    with language_inputs(model) as calls:
        model(**inputs)
    adapter = family_of(model)
    tokens = encode(adapter, inputs, frame_chunk)
    place = adapter.placeholders(inputs["input_ids"])
    there = calls[0]["inputs_embeds"][place].view(2, -1, TEXT["hidden_size"])
    offsets = adapter.token_offsets(adapter.geometry(inputs))
    torch.testing.assert_close(tokens.features.flatten(1, 2), there[:, offsets], rtol=0, atol=1e-5)
    others = [index for index in range(there.shape[1]) if index not in offsets.tolist()]
    assert (tokens.fixed is None) == (not others)
    if tokens.fixed is not None:
        torch.testing.assert_close(tokens.fixed, there[:, others], rtol=0, atol=1e-5)
    for side, layer in zip(tokens.deepstack, calls[0].get("deepstack_visual_embeds") or (), strict=True):
        torch.testing.assert_close(side.flatten(1, 2), layer.view(2, -1, TEXT["hidden_size"]), rtol=0, atol=1e-5)


def test_only_qwen3_has_deepstack_features() -> None:
    counts = {name: len(encode(family_of(build(name)), make_inputs(name)).deepstack) for name in SETUPS}
    assert {name for name, count in counts.items() if count} == {"qwen3_vl"}
    assert counts["qwen3_vl"] == 2


def test_chunks_give_the_same_scores(family: str) -> None:
    adapter, inputs = family_of(build(family)), make_inputs(family, (4, 4))
    whole, chunked = encode(adapter, inputs), encode(adapter, inputs, 1)
    torch.testing.assert_close(whole.attention, chunked.attention)
    torch.testing.assert_close(whole.keys, chunked.keys)


# -- scores and keys ---------------------------------------------------------------------------------------------------


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Attention maps of every vision layer, (rows, heads, n, n) for each call."""
    maps: dict[nn.Module, list[Tensor]] = {}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
        maps.setdefault(module, []).append(weights)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    config = model.config.vision_config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["recorded"] = attend
    config._attn_implementation = "recorded"
    for module in model.modules():
        if getattr(module, "config", None).__class__ is config.__class__:
            module.config._attn_implementation = "recorded"
    yield maps
    config._attn_implementation = before
    del ALL_ATTENTION_FUNCTIONS["recorded"]


def tower_pool(family: str, patches: Tensor) -> Tensor:
    """Patch values (M, P) at the token grid (M, N), by each family's own pooling."""
    side = math.isqrt(patches.shape[1])
    grid = patches.view(-1, 1, side, side)
    pooled = {
        "llava_onevision": lambda: functional.interpolate(grid, size=(4, 4), mode="bilinear"),
        "llava_next_video": lambda: grid[:, :, :8, :8].unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)),
        "internvl": lambda: grid.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)),
    }
    return pooled.get(family, lambda: grid)().flatten(1)


@pytest.mark.parametrize("family", TOWERS)
def test_tower_scores_are_the_attention_from_cls_or_from_all_patches(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (4, 4))
    adapter = family_of(model)
    depth = {"llava_onevision": -1, "internvl": -1}.get(family, -2)
    layers = adapter.tower.encoder.layer if family == "internvl" else adapter.tower.encoder.layers
    attention = getattr(layers[depth], "self_attn", None) or layers[depth].attention
    with recorded_attention(model) as maps:
        tokens = encode(adapter, inputs)
    weights = maps[attention][0].mean(dim=1)
    scores = weights.mean(dim=1) if family == "llava_onevision" else weights[:, 0, 1:]
    torch.testing.assert_close(tokens.attention.flatten(0, 1), tower_pool(family, scores))


@pytest.mark.parametrize("family", TOWERS)
def test_tower_keys_are_those_of_the_feature_layer(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (4, 4))
    adapter = family_of(model)
    layer = adapter.tower.encoder.layer[-1] if family == "internvl" else None
    module = layer.attention.k_norm if layer is not None else None
    if module is None:
        module = adapter.tower.encoder.layers[-1 if family == "llava_onevision" else -2].self_attn.k_proj
    with Capture(keys=module) as outputs:
        tokens = encode(adapter, inputs)
    keys = outputs["keys"] if family == "llava_onevision" else outputs["keys"][:, 1:]
    for channel in (0, 17):
        expected = tower_pool(family, keys[..., channel].contiguous())
        torch.testing.assert_close(tokens.keys[..., channel].flatten(0, 1), expected)


def window_order(height: int, width: int, side: int) -> list[int]:
    """Merged tokens of a slice, in the order of windows of side x side."""
    return [
        row * width + column
        for top in range(0, height, side)
        for left in range(0, width, side)
        for row in range(top, min(top + side, height))
        for column in range(left, min(left + side, width))
    ]


@pytest.mark.parametrize("family", QWEN)
def test_qwen_scores_and_keys_are_means_over_merged_patches_in_raster_order(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (4,))
    adapter, setup = family_of(model), SETUPS[family]
    block = 1 if family == "qwen2_5_vl" else len(model.model.visual.blocks) - 1
    attention = model.model.visual.blocks[block].attn
    with recorded_attention(model) as maps, Capture(qkv=attention.qkv) as outputs:
        tokens = encode(adapter, inputs)
    height, width = setup.grid[1] // 2, setup.grid[2] // 2
    order = list(range(height * width))
    if family == "qwen2_5_vl":
        order = window_order(height, width, 2)
    assert len(maps[attention]) == setup.frames  # one map a slice: the block sees all of it and nothing else
    keys = outputs["qkv"].view(setup.frames, -1, 3, 32)[:, :, 1]
    for frame, weights in enumerate(maps[attention]):
        received = weights[0].mean(dim=(0, 1))
        for place, token in enumerate(order):
            patches = slice(4 * place, 4 * place + 4)
            torch.testing.assert_close(tokens.attention[0, frame, token], received[patches].mean())
            torch.testing.assert_close(tokens.keys[0, frame, token], keys[frame, patches].mean(dim=0))


def test_keys_follow_the_picture(family: str) -> None:
    """The token whose pixels change is the one whose key changes most: nothing is transposed or shifted."""
    setup, adapter, inputs = SETUPS[family], family_of(build(family)), make_inputs(family)
    geometry = adapter.geometry(inputs)
    row, column = geometry.height - 1, 1
    pixels = inputs[setup.name].clone()
    if setup.grid:
        patch = 4 * (row * geometry.width + column)
        pixels.view(setup.frames, -1, pixels.shape[-1])[:, patch : patch + 4] += 3.0
    else:
        size = 16 if family == "llava_next_video" else pixels.shape[-1] / geometry.width
        pixels[..., int(row * size) : int((row + 1) * size), int(size) : int(2 * size)] += 3.0
    before, after = (encode(adapter, inputs | {setup.name: data}).keys for data in (inputs[setup.name], pixels))
    changed = (after - before).norm(dim=-1).sum(dim=(0, 1))
    assert changed.argmax() == row * geometry.width + column


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [(5,), (5, 2)])
def test_positions_stay_the_original_ones(family: str, texts: tuple[int, ...]) -> None:
    model, inputs = build(family), make_inputs(family, texts)
    with language_inputs(model) as calls:
        model(**inputs)
        with prune(model, ViTCoP(retention_ratio=0.3)) as stats:
            model(**inputs)
    full, pruned = (call["position_ids"] for call in calls)
    if full is None:  # the model numbers the tokens itself
        full = torch.arange(inputs["input_ids"].shape[1]).expand(len(texts), -1)
    assert pruned.shape[:-1] == (*full.shape[:-2], len(texts))
    kept = stats.last.kept_per_layer[0]
    assert full.shape[-1] - pruned.shape[-1] == SETUPS[family].counted - kept
    for row in range(len(texts)):
        every = [tuple(column) for column in full[..., row, :].reshape(-1, full.shape[-1]).T.tolist()]
        these = [tuple(column) for column in pruned[..., row, :].reshape(-1, pruned.shape[-1]).T.tolist()]
        text = [
            position
            for position, token in zip(every, inputs["input_ids"][row].tolist(), strict=True)
            if token not in (VIDEO, IMAGE)
        ]
        assert set(these) <= set(every)
        assert not set(text) - set(these)


@pytest.mark.parametrize("family", QWEN)
def test_rope_deltas_are_left_as_the_model_leaves_them(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (5, 2))
    model(**inputs)
    deltas = model.model.rope_deltas
    model.model.rope_deltas = None
    with prune(model, ViTCoP(retention_ratio=0.3)):
        model(**inputs)
    assert torch.equal(model.model.rope_deltas, deltas)


# -- cost --------------------------------------------------------------------------------------------------------------


def test_vision_macs_are_what_the_tower_multiplies(family: str) -> None:
    model, inputs = build(family, "eager"), make_inputs(family)
    adapter = family_of(model)
    geometry = adapter.geometry(inputs)
    random = get_method("random")(retention_ratio=0.5)  # computes no scores
    with FlopCounterMode(display=False) as counter:
        list(adapter.encode(inputs, geometry, random.needs, 32))
    assert adapter.vision_macs(geometry) == counter.get_total_flops() / 2


# -- pictures, and inputs that can't be pruned -------------------------------------------------------------------------


@pytest.mark.parametrize("family", QWEN)
def test_qwen_pictures_are_clips_of_one_frame(family: str) -> None:
    model = build(family)
    setup = SETUPS[family]
    _, height, width = setup.grid
    ids = torch.tensor([[11, 12, *[IMAGE] * setup.per_frame, 13, 14]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(height * width, setup.pixels[1], generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, height, width]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    plain = model.generate(**inputs, max_new_tokens=4)
    with prune(model, ViTCoP(retention_ratio=1.0)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain)
    with prune(model, ViTCoP(retention_ratio=0.5)) as stats:
        model.generate(**inputs, max_new_tokens=4)
    assert stats.last.visual_tokens == setup.per_frame
    assert abs(stats.last.mean_kept - setup.per_frame / 2) <= 1


@pytest.mark.parametrize("family", QWEN)
def test_qwen_inputs_that_do_not_fit(family: str) -> None:
    model, inputs = build(family), make_inputs(family, (3, 3))
    with prune(model, METHOD):
        with pytest.raises(UnsupportedInputError, match="as the processor returns them"):
            model(**{name: value for name, value in inputs.items() if name != "video_grid_thw"})
        with pytest.raises(UnsupportedInputError, match="pass the pictures as videos"):
            model(**inputs, pixel_values=inputs["pixel_values_videos"])
        frames, height, width = SETUPS[family].grid
        other = inputs | {"video_grid_thw": torch.tensor([[frames, height, width], [frames, width, height]])}
        with pytest.raises(UnsupportedInputError, match=r"one grid.*other batches"):
            model(**other)


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "video_llava"])
def test_pictures_of_video_models_are_refused(family: str) -> None:
    model = build(family)
    with prune(model, METHOD), pytest.raises(UnsupportedInputError, match="video of one frame"):
        model(input_ids=torch.tensor([[IMAGE]]), pixel_values=torch.zeros(1, 3, 32, 32))


def test_several_pictures_of_a_prompt_are_pruned_like_frames() -> None:
    model, per_picture = build("llava"), SETUPS["llava"].per_frame
    ids = torch.tensor([[11, *[IMAGE] * per_picture, 12, *[IMAGE] * per_picture, 13]] * 2)
    pixels = torch.randn(4, *SETUPS["llava"].pixels, generator=torch.Generator().manual_seed(0))
    with prune(model, METHOD) as stats:
        both = model(input_ids=ids, pixel_values=pixels).logits
        second = model(input_ids=ids[1:], pixel_values=pixels[2:]).logits
    assert stats.last.visual_tokens == 2 * per_picture
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_pictures_must_match_the_placeholders(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    ids = inputs["input_ids"]
    with prune(model, METHOD):
        with pytest.raises(UnsupportedInputError, match=r"whole pictures|each prompt needs one video"):
            model(input_ids=ids[:, :20], pixel_values=inputs["pixel_values"])
        with pytest.raises(UnsupportedInputError, match="whole pictures"):
            model(input_ids=ids[:, :3], pixel_values=inputs["pixel_values"])


def test_different_numbers_of_frames_in_a_batch_are_refused(family: str) -> None:
    """Never pruned silently wrong, and told the way out."""
    model, inputs = build(family), make_inputs(family, (6, 6))
    ids = inputs["input_ids"].clone()
    ids[1, 3:5] = 20  # the second prompt has fewer placeholders
    with prune(model, METHOD), pytest.raises(UnsupportedInputError, match="other batches"):
        model(**inputs | {"input_ids": ids})
