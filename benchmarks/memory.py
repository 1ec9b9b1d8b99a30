"""Frames against peak memory, full and pruned, in one run: `python -m benchmarks.memory`.

Counts what torch's allocator hands out above the weights (see `benchmarks.tracking`), from the making of the pixels to
the end of the prefill, and says which tensors hold the peak. For a budget, looks for the most frames that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from transformers import PreTrainedModel

from benchmarks.common import machine, publish
from benchmarks.shapes import SHAPES, build_model, make_inputs, shape_numbers
from benchmarks.tracking import Peak, named, peak_memory
from vitcop import PrefillRecord, ViTCoP, prune
from vitcop.cost import kv_bytes

GOAL = 10
HOLDERS = 8
TOLERANCE = 0.03
"""How near the most frames that fit are found, as a share of them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the model.

    Attributes:
        keep_ratio: 1 is the unpruned model, outside of any context.
    """

    keep_ratio: float
    frame_chunk: int
    token_chunk: int


def prefill(model: PreTrainedModel, frames: int, setting: Setting) -> PrefillRecord | None:
    """Make a clip and prefill it."""
    with named("pixels"):
        inputs = make_inputs(model, frames)
    with torch.inference_mode():
        if setting.keep_ratio == 1:
            model(**inputs, logits_to_keep=1)
            return None
        method = ViTCoP(retention_ratio=setting.keep_ratio)
        with prune(model, method, frame_chunk=setting.frame_chunk, token_chunk=setting.token_chunk) as stats:
            model(**inputs, logits_to_keep=1)
        return stats.last


def bytes_per_frame(model: PreTrainedModel, record: PrefillRecord | None, frames: int) -> float:
    """What each further frame adds to the peak, by formula; `record` is of a pruned prefill, None is the full model.

    With T tokens and P patches a frame, width D and MLP width m of the language model, d and m_v of the vision tower,
    e bytes a number. Full: the pixels, and the larger of the vision MLP, P (2 m_v + 4 d) e, and the language MLP,
    T (3 m + 5 D) e beside the tower's output, 2 P d e, and the KV cache. Pruned: the pixels, and the n0 tokens that
    entered, 8 n0 D e in the first layers (features, embeddings, residual, normed, queries, and three more of these
    while they are rotated), with keys and values four times, before and behind the rotation and in the cache.
    """
    vision, text, size = model.config.vision_config, model.config.text_config, model.dtype.itemsize
    pixels = 3 * vision.image_size**2 * size
    if record is not None:
        entering = record.stages["vision"] / frames
        return pixels + 8 * entering * text.hidden_size * size + kv_bytes(text, [2 * entering], size)
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = (-(-(vision.image_size // vision.patch_size) // 2)) ** 2
    tower = patches * (2 * vision.intermediate_size + 4 * vision.hidden_size) * size
    language = tokens * (3 * text.intermediate_size + 5 * text.hidden_size) * size
    cache = kv_bytes(text, [tokens] * text.num_hidden_layers, size)
    return pixels + max(tower, language + 2 * patches * vision.hidden_size * size + cache)


def measure(model: PreTrainedModel, frames: int, setting: Setting) -> Peak:
    return peak_memory(lambda: prefill(model, frames, setting), model, model.device)


def most_frames(
    peak_of: Callable[[int], int], budget: int, measured: dict[int, int], per_frame: float, cap: int
) -> int:
    """The most frames whose peak stays within a budget, up to `cap`, within `TOLERANCE`.

    Args:
        measured: peaks by frames, one at least; those measured here are added.
        per_frame: bytes of a further frame, as far as they are known; few frames can hide behind a constant peak.
    """
    while True:
        fitting = max((frames for frames, peak in measured.items() if peak <= budget), default=0)
        over = min((frames for frames, peak in measured.items() if peak > budget), default=cap + 1)
        if over - fitting <= max(1, TOLERANCE * fitting):
            return fitting
        frames = min(max(_where_line_meets(measured, budget, per_frame), fitting + 1), over - 1)
        measured[frames] = peak_of(frames)


def _where_line_meets(measured: dict[int, int], budget: int, per_frame: float) -> int:
    """Frames at which the line through the two points nearest to the budget reaches it."""
    (frames, peak), *others = sorted(measured.items(), key=lambda point: abs(point[1] - budget))[:2]
    slopes = [(peak - other_peak) / (frames - other) for other, other_peak in others]
    return frames + int((budget - peak) / max(per_frame, *slopes))


def run_setting(model: PreTrainedModel, setting: Setting, frames: Sequence[int], budget: int | None, cap: int) -> Any:
    """Peaks at each number of frames, the bytes of a further frame, and the most frames within the budget.

    Without a budget, the peak at the largest number of frames is the budget.
    """
    peaks = {count: measure(model, count, setting) for count in frames}
    few, many = sorted(peaks)[-2:]
    per_frame = bytes_per_frame(model, prefill(model, few, setting), few)

    def peak_of(count: int) -> int:
        peaks[count] = measure(model, count, setting)
        return peaks[count].bytes

    measured = {count: peak.bytes for count, peak in peaks.items()}
    if budget is None:
        budget, fitting = measured[many], many
    else:
        fitting = most_frames(peak_of, budget, measured, per_frame, cap)
    few, many = sorted(peaks)[-2:]
    return {
        **vars(setting),
        "peaks": {count: peaks[count].bytes for count in sorted(peaks)},
        "bytes_per_frame": {
            "measured": round((peaks[many].bytes - peaks[few].bytes) / (many - few)),
            "formula": round(per_frame),
        },
        "holders": dict(peaks[many].holders[:HOLDERS]),
        "budget": budget,
        "most_frames": fitting,
    }


ShapeName = Literal[tuple(shape for shape in SHAPES if "qwen" not in shape)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and on what."""

    shape: ShapeName = "embedded"
    frames: tuple[int, ...] = (16, 32)
    """Two numbers or more."""
    keep_ratios: tuple[float, ...] = (0.1,)
    frame_chunk: int = 4
    token_chunk: int = 1024
    budget: int | None = None
    """Bytes above the weights. None: the full model's largest peak."""
    cap: int = 4096
    """Never more frames than this."""
    dtype: str = "float32"
    device: str = "cpu"
    """A torch device."""
    threads: int = torch.get_num_threads()
    save: bool = False
    """Keep the result under benchmarks/results/."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.memory", description=__doc__)
    torch.set_num_threads(options.threads)
    model = build_model(options.shape, torch.device(options.device), getattr(torch, options.dtype))
    results, budget = [], options.budget
    for ratio in (1.0, *options.keep_ratios):
        setting = Setting(keep_ratio=ratio, frame_chunk=options.frame_chunk, token_chunk=options.token_chunk)
        results.append(run_setting(model, setting, options.frames, budget, options.cap))
        budget = results[0]["budget"]
        results[-1]["times_the_frames"] = results[-1]["most_frames"] / max(1, results[0]["most_frames"])
    result = {
        "benchmark": "memory",
        "machine": machine(torch.device(options.device)),
        "shape": {"name": options.shape, "dtype": options.dtype, "config": shape_numbers(model)},
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "goal": {"times the frames at 10 %": GOAL},
        "results": results,
    }
    publish(f"memory-{options.shape}", result, options.save)


if __name__ == "__main__":
    main()
