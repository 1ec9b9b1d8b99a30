"""What a prefill must not do: make an attention map, or wait for the device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vitcop.models import SETUPS, VOCABULARY, build, make_inputs
from tests.vitcop.runs import cached
from vitcop import ViTCoP, prune
from vitcop.budget import Geometry, Plan
from vitcop.methods.base import Method
from vitcop.selection import Selection
from vitcop.tokens import LayerTokens, VisualTokens


class NoMaps(TorchDispatchMode):
    """Fails when a tensor of `size` x `size` or more, or a softmax over that many rows, is made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and min(tensor.shape[-2:]) >= self.size:
                raise AssertionError(f"{func} made a tensor of shape {tuple(tensor.shape)}")
        return result


def long_inputs(family: str) -> dict[str, Tensor]:
    """A prompt whose text alone is longer than any other dimension in the model."""
    inputs = make_inputs(family, (VOCABULARY + 10,))
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


@pytest.mark.parametrize("method", [ViTCoP(retention_ratio=0.3), ViTCoP(retention_ratio=0.3, key_source="before_norm")])
def test_no_attention_map_is_made(family: str, method: Method) -> None:
    model, inputs = build(family), long_inputs(family)
    with prune(model, method) as stats, NoMaps(VOCABULARY + 1):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        model(input_ids=torch.tensor([[20, 21]]), past_key_values=cache)
    assert min(cached(cache)) > VOCABULARY + 1
    assert stats.last.retention < 0.4


def test_the_check_for_maps_can_fail() -> None:
    model, inputs = build("llava", "eager"), long_inputs("llava")
    with pytest.raises(AssertionError, match="made a tensor"), NoMaps(VOCABULARY + 1):
        model(**inputs, logits_to_keep=1)


@dataclass(frozen=True, kw_only=True)
class OnMeta(ViTCoP):
    """Gets its tokens on the meta device, where a value that is read back raises."""

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        assert tokens.features.is_meta
        return super().select_frames(tokens, plan, geometry)


def test_selection_reads_nothing_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values, `.item()`, `.tolist()`, `bool()`, `nonzero` and copies to the CPU all raise.

    The geometry of the clip is asked for before: it comes from the placeholders (pictures) or the grid (Qwen).
    """
    model, inputs = build(family), make_inputs(family)
    context = prune(model, OnMeta(retention_ratio=0.3), frame_chunk=2)
    adapter = context.family
    geometry = adapter.geometry(inputs)
    chunks = [_to_meta(chunk) for chunk in adapter.encode(inputs, geometry, context.method.needs, 2)]
    monkeypatch.setattr(adapter, "geometry", lambda inputs: geometry)
    monkeypatch.setattr(adapter, "encode", lambda *args: iter(chunks))
    ids = inputs["input_ids"].to("meta")
    positions = torch.empty((3, *ids.shape) if SETUPS[family].grid else ids.shape, dtype=torch.long, device="meta")
    model.to("meta")
    with context as stats:
        model(input_ids=ids, pixel_values=ids, position_ids=positions) if SETUPS[
            family
        ].name == "pixel_values" else model(input_ids=ids, pixel_values_videos=ids, position_ids=positions)
    assert len(stats.last.stages) == 3


def _to_meta(tokens: VisualTokens) -> VisualTokens:
    fields = {name: getattr(tokens, name) for name in VisualTokens.__dataclass_fields__}
    moved = {name: value.to("meta") for name, value in fields.items() if isinstance(value, Tensor)}
    deepstack = tuple(side.to("meta") for side in tokens.deepstack)
    return VisualTokens(**{**fields, **moved, "deepstack": deepstack})


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "video_llava"])
def test_vision_of_video_towers_reads_nothing_back(family: str) -> None:
    model = build(family).to("meta")
    inputs = {name: value.to("meta") for name, value in make_inputs(family).items() if name != "attention_mask"}
    with prune(model, ViTCoP(retention_ratio=0.3), frame_chunk=2) as stats:
        model(**inputs)
    assert len(stats.last.stages) == 3


class CountReads(TorchDispatchMode):
    """Counts the operations by which a value reaches the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select")
        self.count += str(func).startswith(names)
        return func(*args, **(kwargs or {}))


def test_selection_inside_the_model_reads_no_value(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    counts: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Counted(ViTCoP):
        def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
            with CountReads() as reads:
                selection = super().select_frames(tokens, plan, geometry)
            counts.append(reads.count)
            return selection

        def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
            with CountReads() as reads:
                selection = super().select_layer(tokens, plan, geometry)
            counts.append(reads.count)
            return selection

    with prune(model, Counted(retention_ratio=0.3)):
        model(**inputs)
    assert counts == [0, 0, 0]
    with CountReads() as reads:
        torch.tensor([0, 1]).nonzero()
        bool(torch.tensor(True))
    assert reads.count == 2


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "video_llava"])
def test_one_value_is_read_before_the_vision_tower_runs(family: str) -> None:
    """Whether every row has its placeholders; the other families also read the clip's grid."""
    model, inputs = build(family), make_inputs(family, (5, 2))
    before_tower: list[int] = []
    with prune(model, ViTCoP(retention_ratio=0.3)) as stats, CountReads() as reads:
        tower = model.model.video_tower if family == "video_llava" else model.model.vision_tower
        handle = tower.register_forward_pre_hook(lambda module, args: before_tower.append(reads.count))
        model(**inputs)
    handle.remove()
    assert stats.last.retention < 0.4
    assert before_tower == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_prefill_synchronises_once_on_a_gpu() -> None:
    model = build("llava_onevision").to("cuda")
    inputs = {name: value.cuda() for name, value in make_inputs("llava_onevision").items() if name != "attention_mask"}
    with prune(model, ViTCoP(retention_ratio=0.3)) as stats:
        model(**inputs)
        pixels = inputs["pixel_values_videos"].clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(**inputs | {"pixel_values_videos": pixels})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(stats.records) == 2
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1
