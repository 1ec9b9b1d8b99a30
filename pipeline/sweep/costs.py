"""What the cells cost: one worker, alone on the machine, times them in turn on a few clips."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from pipeline.decoding import TimedVideo
from pipeline.manifest import Clip
from pipeline.model.answer import Answer
from pipeline.model.answerer import exit_when_device_fails, questions_of
from pipeline.model.prompt import Question
from pipeline.sweep.cells import FULL, Cell, Record
from pipeline.sweep.timing import doubt, spread
from pipeline.sweep.worker import SweepModel

PHASES = ("vision", "selection", "prefill", "generate")
REPEATS = 2
"""How often a cost that can't be relied on is measured again, `cost_rounds` rounds each time."""


class Picture(TypedDict):
    """What a cell made of a clip, for the gallery; `stages` has the (K,) numbers of the tokens that each stage kept."""

    prediction: str | None
    correct: bool | None
    stages: dict[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What one clip showed of the cells.

    Attributes:
        costs: by cell name, the seconds of each phase, medians over rounds and their quartiles.
        facts: by cell name, what method and model say of the cell (settings, tokens per layer, operations, cache).
        gallery: by cell name, the answer and the tokens kept at each stage.
        frames: (T, H, W, 3) uint8, at the smallest frame count.
        grid: frames, rows and columns of its visual tokens.
    """

    costs: dict[str, dict[str, float]]
    facts: dict[str, Record]
    gallery: dict[str, Picture]
    frames: np.ndarray
    grid: tuple[int, int, int]


class SweepMeasurer(SweepModel):
    """Times every cell on one question of a clip, the cells taking turns; the engine's `Answerer`."""

    @exit_when_device_fails()
    def answer(self, clip: Clip, videos: Sequence[TimedVideo]) -> Measured:
        """Costs over `cost_rounds` rounds, after one round that only warms up.

        Cells whose cost can't be relied on are measured again, up to `REPEATS` times, beside the full model; what was
        measured before counts as well.
        """
        question = questions_of(clip)[:1]
        # Every cell with the frames that it sees, decoded once for all cells of one frame count.
        timed = {cell: video for video, cells in self.by_frames(videos) for cell in cells}
        # The round that warms up; its answers make the gallery.
        pictures = {cell: self._picture(cell, answer) for cell, answer in self._round(timed, question)}
        measured: dict[Cell, list[Answer]] = defaultdict(list)
        rounds = self.config.sweep.cost_rounds if self.config.sweep.cost_clips else 0
        again = timed
        for repeat in range(1 + REPEATS):
            for number in range(rounds):
                for cell, answer in self._round(again, question, first=number + rounds * repeat):
                    measured[cell].append(answer)
            # What is in doubt goes again, and so does the full model, by which speed-ups are judged.
            doubtful = self._doubtful(measured)
            beside = {Cell(method=FULL, num_frames=cell.num_frames) for cell in doubtful}
            again = {cell: video for cell, video in timed.items() if cell in doubtful or cell in beside}
            if not again:
                break
        first = next(iter(timed))
        return Measured(
            costs={cell.name: self._costs(answers, timed[cell].seconds) for cell, answers in measured.items()},
            facts={cell.name: self._facts(cell) for cell in timed},
            gallery={cell.name: picture for cell, picture in pictures.items()},
            frames=timed[first].video.frames,
            grid=self._grid(first),
        )

    def _round(
        self, timed: Mapping[Cell, TimedVideo], question: Sequence[Question], first: int = 0
    ) -> Iterator[tuple[Cell, Answer]]:
        """One answer of each cell that can prune the clip. The round starts with another cell each time."""
        cells = list(timed)
        for number in range(len(cells)):
            cell = cells[(first + number) % len(cells)]
            (answer,) = self.models[cell].answer(timed[cell].video, question)
            if answer.error is None:
                yield cell, answer

    def _doubtful(self, measured: Mapping[Cell, Sequence[Answer]]) -> set[Cell]:
        """Cells whose rounds disagree, or that are faster than their operation counts allow."""
        totals = {cell: spread([_total(answer) for answer in answers]) for cell, answers in measured.items()}
        operations = {cell: self._facts(cell)["flops_total"] for cell in measured}
        found = set()
        for cell, total in totals.items():
            full = Cell(method=FULL, num_frames=cell.num_frames)
            known = full in totals
            speedup = totals[full].median / total.median if known else None
            allowed = operations[full] / operations[cell] if known else None
            if doubt(total, len(measured[cell]), speedup, allowed):
                found.add(cell)
        return found

    def _facts(self, cell: Cell) -> Record:
        model = self.models[cell]
        kind = type(model.method)
        facts: Record = {
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

    def _costs(self, answers: Sequence[Answer], decode: float) -> dict[str, float]:
        """Costs of one question on one clip, medians and quartiles; `decode` was measured once."""
        rounds = {phase: [getattr(answer, f"seconds_{phase}") for answer in answers] for phase in PHASES}
        rounds["total"] = [_total(answer) for answer in answers]
        if all(answer.generated_tokens for answer in answers):
            rounds["per_token"] = [answer.seconds_generate / answer.generated_tokens for answer in answers]
        costs = {"seconds_decode": decode, "cost_runs": len(answers)}
        for phase, seconds in rounds.items():
            over = spread(seconds)
            costs |= {f"seconds_{phase}": over.median, f"seconds_{phase}_low": over.low}
            costs[f"seconds_{phase}_high"] = over.high
        if self.loaded.device.type == "cuda":  # on the CPU it is the process's peak, which says nothing of a cell
            costs["peak_memory_bytes"] = max(answer.peak_memory_bytes for answer in answers)
        return costs

    def _picture(self, cell: Cell, answer: Answer) -> Picture:
        record = self.models[cell].record
        kept = {} if record is None else {name: index[0].numpy(force=True) for name, index in record.kept_index.items()}
        return {"prediction": answer.prediction, "correct": answer.correct, "stages": kept}

    def _grid(self, cell: Cell) -> tuple[int, int, int]:
        record = self.models[cell].record
        if record is None:
            raise RuntimeError("no clip has been answered")
        return record.grid


def _total(answer: Answer) -> float:
    """Seconds from the frames to the answer."""
    return float(sum(getattr(answer, f"seconds_{phase}") for phase in PHASES))


def merge_costs(measured: Sequence[Measured]) -> Mapping[str, Record]:
    """By cell, medians over clips of times and of their quartiles; runs add up, memory is the most of any clip."""
    by_cell: dict[str, list[dict[str, float]]] = defaultdict(list)
    for clip in measured:
        for name, costs in clip.costs.items():
            by_cell[name].append(costs)
    return {name: _over_clips(costs) for name, costs in by_cell.items()}


def _over_clips(costs: Sequence[Mapping[str, float]]) -> Record:
    names = {name for each in costs for name in each if name.startswith("seconds")}
    merged: Record = {name: statistics.median(each[name] for each in costs if name in each) for name in names}
    merged["cost_runs"] = int(sum(each["cost_runs"] for each in costs))
    merged["cost_rounds"] = int(min(each["cost_runs"] for each in costs))
    # The slow quartile of the seconds is the low one of the pace.
    merged["videos_per_second"] = 1 / merged["seconds_total"]
    merged["videos_per_second_low"] = 1 / merged["seconds_total_high"]
    merged["videos_per_second_high"] = 1 / merged["seconds_total_low"]
    memory = [int(each["peak_memory_bytes"]) for each in costs if "peak_memory_bytes" in each]
    return merged | ({"peak_memory_bytes": max(memory)} if memory else {})
