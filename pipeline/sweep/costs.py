"""What the cells cost: one worker, alone on the machine, times them in turn on a few clips."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.decoding import TimedVideo
from pipeline.manifest import Clip
from pipeline.model.answerer import exit_when_device_fails, questions_of
from pipeline.model.answering import Answer
from pipeline.sweep.cells import FULL, Cell
from pipeline.sweep.worker import SweepModel

PHASES = ("vision", "selection", "prefill", "generate")


@dataclass(frozen=True)
class Measured:
    """What one clip showed of the cells.

    Attributes:
        costs: by cell name, medians over rounds of the seconds of each phase.
        facts: by cell name, what method and model say of the cell (settings, tokens per layer, operations, cache).
        gallery: by cell name, the answer and the tokens kept at each stage.
        frames: (T, H, W, 3) uint8, at the smallest frame count.
        grid: frames, rows and columns of its visual tokens.
    """

    costs: dict[str, dict[str, float]]
    facts: dict[str, dict[str, Any]]
    gallery: dict[str, dict[str, Any]]
    frames: np.ndarray
    grid: tuple[int, int, int]


class SweepMeasurer(SweepModel):
    """Times every cell on one question of a clip, the cells taking turns; the engine's `Answerer`."""

    @exit_when_device_fails()
    def answer(self, clip: Clip, videos: Sequence[TimedVideo]) -> Measured:
        """Medians over `cost_rounds` rounds, after one round that only warms up."""
        question = questions_of(clip)[:1]
        seconds: dict[Cell, list[Answer]] = defaultdict(list)
        gallery: dict[str, dict[str, Any]] = {}
        videos_of = {cell: timed for timed, cells in self.by_frames(videos) for cell in cells}
        rounds = self.config.sweep.cost_rounds if self.config.sweep.cost_clips else 0
        for number in range(1 + rounds):
            for cell, timed in videos_of.items():
                (answer,) = self.models[cell].answer(timed.video, question)
                if answer.error is not None:
                    continue
                if number:
                    seconds[cell].append(answer)
                else:
                    gallery[cell.name] = self._picture(cell, answer)
        first = next(iter(videos_of))
        return Measured(
            costs={cell.name: self._medians(answers, videos_of[cell].seconds) for cell, answers in seconds.items()},
            facts={cell.name: self._facts(cell) for cell in videos_of},
            gallery=gallery,
            frames=videos_of[first].video.frames,
            grid=self._grid(first),
        )

    def _facts(self, cell: Cell) -> dict[str, Any]:
        model = self.models[cell]
        kind = type(model.method)
        facts: dict[str, Any] = {
            "settings": "all tokens kept" if cell.method == FULL else model.method.describe(),
            "query_aware": kind.query_aware,
            "baseline": kind.baseline,
        }
        if (record := model.record) is None:
            return facts
        return facts | {
            "kept_per_layer": list(record.kept_per_layer),
            "kv_bytes": float(record.kv_bytes),
            "macs_vision": float(record.macs_vision),
            "macs_language": float(record.macs_language),
            "flops_total": 2 * float(record.macs_vision + record.macs_language),
        }

    def _medians(self, answers: Sequence[Answer], decode: float) -> dict[str, float]:
        """Costs of one question on one clip; `decode` was measured once."""
        medians = {
            f"seconds_{phase}": statistics.median(getattr(a, f"seconds_{phase}") for a in answers) for phase in PHASES
        }
        tokens = statistics.median(answer.generated_tokens for answer in answers)
        total = statistics.median(sum(getattr(a, f"seconds_{phase}") for phase in PHASES) for a in answers)
        costs = medians | {"seconds_decode": decode, "seconds_total": total, "cost_runs": len(answers)}
        if tokens:
            costs["seconds_per_token"] = medians["seconds_generate"] / tokens
        if self.loaded.device.type == "cuda":  # on the CPU it is the process's peak, which says nothing of a cell
            costs["peak_memory_bytes"] = max(answer.peak_memory_bytes for answer in answers)
        return costs

    def _picture(self, cell: Cell, answer: Answer) -> dict[str, Any]:
        record = self.models[cell].record
        kept = {} if record is None else {name: index[0].numpy(force=True) for name, index in record.kept_index.items()}
        return {"prediction": answer.prediction, "correct": answer.correct, "stages": kept}

    def _grid(self, cell: Cell) -> tuple[int, int, int]:
        record = self.models[cell].record
        if record is None:
            raise RuntimeError("no clip has been answered")
        return record.grid


def merge_costs(measured: Sequence[Measured]) -> Mapping[str, Mapping[str, Any]]:
    """By cell, medians over clips; `cost_runs` and memory add up and take the most."""
    by_cell: dict[str, list[dict[str, float]]] = defaultdict(list)
    for clip in measured:
        for name, costs in clip.costs.items():
            by_cell[name].append(costs)
    return {name: _over_clips(costs) for name, costs in by_cell.items()}


def _over_clips(costs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    names = {name for each in costs for name in each if name.startswith("seconds")}
    merged: dict[str, Any] = {name: statistics.median(each[name] for each in costs if name in each) for name in names}
    merged["cost_runs"] = int(sum(each["cost_runs"] for each in costs))
    merged["videos_per_second"] = 1 / merged["seconds_total"]
    memory = [int(each["peak_memory_bytes"]) for each in costs if "peak_memory_bytes" in each]
    return merged | ({"peak_memory_bytes": max(memory)} if memory else {})
