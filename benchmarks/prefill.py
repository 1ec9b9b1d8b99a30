"""Full against pruned on models of real shapes with random weights: `python -m benchmarks.prefill`.

Seconds for vision, selection, prefill and a decoded token, and peak memory; beside each gain the one that the
multiply-accumulates allow. Full is the same model inside `prune` at retention 1, which changes nothing. The variants
take turns, and figures are medians.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import alternate, machine, medians, publish
from benchmarks.shapes import SHAPES, build_model, make_inputs, shape_numbers
from benchmarks.tracking import peak_memory
from pipeline.model.clock import PhaseClock
from vitcop import METHODS, Method, PrefillRecord, get_method, prune

GOALS = {"selection share of the unpruned prefill": 0.02, "prefill gain / allowed": {"cpu": 0.8, "cuda": 0.9}}
FULL = 1.0


def run_once(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], method: Method, tokens: int, frame_chunk: int
) -> tuple[dict[str, float], PrefillRecord]:
    """Seconds by phase of one prefill and `tokens` decoded tokens, and what the prefill did."""
    clock = PhaseClock(model.device)
    with torch.inference_mode(), prune(model, method, frame_chunk=frame_chunk, clock=clock) as stats:
        output = model(**inputs, logits_to_keep=1, use_cache=True)
        for _ in range(tokens):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(input_ids=token, past_key_values=output.past_key_values)
    seconds = dict(clock.seconds)
    seconds["decode per token"] = seconds.pop("generate", 0.0) / max(1, tokens)
    seconds["to the first token"] = sum(seconds.get(phase, 0.0) for phase in ("vision", "selection", "prefill"))
    assert stats.last is not None
    return seconds, stats.last


def compare(options: Options, shape: str) -> dict[str, Any]:
    """All variants of one shape."""
    model = build_model(shape, torch.device(options.device), getattr(torch, options.dtype), options.attention)
    inputs, chosen = make_inputs(model, options.frames), get_method(options.method)
    runs = {
        ratio: partial(run_once, model, inputs, chosen(retention_ratio=ratio), options.tokens, options.frame_chunk)
        for ratio in (FULL, *options.keep_ratios)
    }
    measured = alternate(runs, options.repeats)
    seconds = {ratio: medians([run for run, _ in measured[ratio]]) for ratio in runs}
    records = {ratio: measured[ratio][0][1] for ratio in runs}
    peaks = {ratio: peak_memory(run, model, torch.device(options.device)) for ratio, run in runs.items()}
    full = describe(seconds[FULL], records[FULL], peaks[FULL].bytes)
    pruned = [
        {
            "keep_ratio": ratio,
            **describe(seconds[ratio], records[ratio], peaks[ratio].bytes),
            **gains(seconds[FULL], records[FULL], seconds[ratio], records[ratio]),
        }
        for ratio in options.keep_ratios
    ]
    return {
        "shape": {
            "name": shape,
            "frames": options.frames,
            "tokens": records[FULL].visual_tokens,
            **shape_numbers(model),
        },
        "full": full,
        "pruned": pruned,
    }


def describe(seconds: Mapping[str, float], record: PrefillRecord, peak: int) -> dict[str, Any]:
    """One variant's figures."""
    return {
        "seconds": {phase: round(value, 6) for phase, value in seconds.items()},
        "peak_bytes": peak,
        "kv_bytes": record.kv_bytes,
        "stages": record.stages,
        "macs": {"vision": record.macs_vision, "language": record.macs_language},
    }


def gains(
    full: Mapping[str, float], full_record: PrefillRecord, pruned: Mapping[str, float], record: PrefillRecord
) -> dict[str, Any]:
    """How much faster the pruned model is, and how much faster its multiply-accumulates allow it to be.

    Selection counts as part of the pruned prefill. Scores that are taken inside the vision tower are in its time.
    """
    work = {"prefill": ("selection", "prefill"), "to the first token": ("to the first token",)}
    allowed = {
        "prefill": full_record.macs_language / record.macs_language,
        "to the first token": (full_record.macs_vision + full_record.macs_language)
        / (record.macs_vision + record.macs_language),
    }
    measured = {name: full[name] / sum(pruned[phase] for phase in phases) for name, phases in work.items()}
    return {
        "gain": {
            name: {"measured": value, "allowed": allowed[name], "measured / allowed": value / allowed[name]}
            for name, value in measured.items()
        },
        "decode gain": full["decode per token"] / pruned["decode per token"] if pruned["decode per token"] else None,
        "selection share of the unpruned prefill": pruned["selection"] / full["prefill"],
        "vision time against unpruned": pruned["vision"] / full["vision"],
    }


ShapeName, MethodName = Literal[tuple(SHAPES)], Literal[tuple(sorted(METHODS))]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and on what."""

    shapes: tuple[ShapeName, ...] = ("embedded",)
    method: MethodName = "vitcop"
    frames: int = 32
    keep_ratios: tuple[float, ...] = (0.5, 0.25, 0.1)
    tokens: int = 8
    """Tokens decoded after the prefill."""
    repeats: int = 5
    frame_chunk: int = 16
    attention: str = "sdpa"
    dtype: str = "float32"
    device: str = "cpu"
    """A torch device."""
    threads: int = torch.get_num_threads()
    save: bool = False
    """Keep the results under benchmarks/results/."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.prefill", description=__doc__)
    torch.set_num_threads(options.threads)
    for shape in options.shapes:
        result = {
            "benchmark": "prefill",
            "machine": machine(torch.device(options.device)),
            "settings": {name: getattr(options, name) for name in ("method", "dtype", "attention", "repeats")},
            "goals": GOALS,
            **compare(options, shape),
        }
        name = f"prefill-{shape}" if options.method == "vitcop" else f"prefill-{shape}-{options.method}"
        publish(name, result, options.save)


if __name__ == "__main__":
    main()
