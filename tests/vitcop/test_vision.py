"""Between vision tower and language model: chunks of frames, and clips that are encoded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.vitcop.models import SETUPS, build, make_inputs
from tests.vitcop.runs import METHOD, run
from vitcop import (
    VisionCache,
    ViTCoP,
    get_method,
    prune,
)


@pytest.mark.parametrize("frame_chunk", [1, 3])
def test_chunks_of_frames_change_nothing(family: str, frame_chunk: int) -> None:
    model, inputs, method = build(family), make_inputs(family, (4, 2)), ViTCoP(retention_ratio=0.3)
    with prune(model, method):
        whole, _ = run(model, inputs)
    with prune(model, method, frame_chunk=frame_chunk):
        chunked, _ = run(model, inputs)
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_same_pixels_are_encoded_once(family: str) -> None:
    """A second question on the tensor of a clip reuses its tokens; other pixels, even in the same place, do not."""
    model, setup = build(family), SETUPS[family]
    inputs = {name: value.clone() for name, value in make_inputs(family).items()}
    calls: list[int] = []
    tower = (
        getattr(model.model, "visual", None) or getattr(model.model, "video_tower", None) or model.model.vision_tower
    )
    handle = tower.register_forward_pre_hook(lambda *args: calls.append(1))
    with prune(model, METHOD):
        first = model(**inputs, logits_to_keep=1).logits
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, first)
        assert len(calls) == 1
        other = inputs | {setup.name: inputs[setup.name] + 1}
        assert not torch.equal(model(**other, logits_to_keep=1).logits, first)
        assert len(calls) == 2
    handle.remove()


def test_pixels_changed_in_place_are_encoded_anew() -> None:
    with torch.inference_mode(False), torch.no_grad():
        model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
        with prune(model, METHOD):
            first = model(**inputs, logits_to_keep=1).logits
            inputs["pixel_values_videos"].add_(1)
            assert not torch.equal(model(**inputs, logits_to_keep=1).logits, first)


FAMILY = "llava_next_video"
METHODS = [
    get_method("grid")(retention_ratio=0.5),
    ViTCoP(retention_ratio=0.5),
    get_method("random")(retention_ratio=0.25),
]


def tower_runs(model: nn.Module) -> list[int]:
    """Grows by one entry whenever the model's vision tower runs."""
    runs: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    return runs


def logits(model: nn.Module, inputs: dict[str, Tensor], cache: VisionCache | None) -> list[Tensor]:
    results = []
    for method in METHODS:
        with torch.no_grad(), prune(model, method, vision=cache):
            results.append(model(**inputs).logits[:, -1])
    return results


def test_methods_that_share_a_clip_answer_as_alone_and_the_tower_runs_once_a_need() -> None:
    model, inputs = build(FAMILY), make_inputs(FAMILY)
    alone = logits(model, inputs, None)
    runs = tower_runs(model)
    shared = logits(model, inputs, VisionCache())
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
    assert len(runs) == 2, "once without attention and keys, once with"


def test_other_pixels_are_encoded_anew() -> None:
    model, cache = build(FAMILY), VisionCache()
    first, second = (make_inputs(FAMILY, seed=seed) for seed in (0, 1))
    logits(model, first, cache)
    assert torch.equal(logits(model, second, cache)[0], logits(model, second, None)[0])


def test_pixels_written_over_are_encoded_anew() -> None:
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode don't count changes
        model, cache, inputs = build(FAMILY), VisionCache(), make_inputs(FAMILY)
        logits(model, inputs, cache)
        inputs["pixel_values_videos"].mul_(-1)
        assert torch.equal(logits(model, inputs, cache)[0], logits(model, inputs, None)[0])


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision"])
def test_text_after_a_prompt_that_ends_with_a_pruned_token_stands_where_it_stands_in_the_whole(family: str) -> None:
    model, inputs = build(family), make_inputs(family, texts=(6,))
    ids, method = inputs.pop("input_ids"), ViTCoP(retention_ratio=0.3)
    del inputs["attention_mask"]
    with torch.no_grad(), prune(model, method):
        whole = model(input_ids=ids, **inputs).logits[:, -1]
        cache = model(input_ids=ids[:, :-6], **inputs).past_key_values
        continued = model(input_ids=ids[:, -6:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(continued, whole, rtol=1e-4, atol=1e-4)
