"""Made-up sweeps: folders as `jobs/sweep.py` leaves them, with answers drawn at random."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sweep.cells import Cell
from pipeline.sweep.summary import summarize_cells

RATIOS = (0.5, 0.25, 0.15, 0.1, 0.05, 0.02)
SKILLS = {
    "random": 0.80,
    "frame_subsample": 0.72,
    "grid": 0.78,
    "evs": 0.84,
    "divprune": 0.87,
    "visionzip": 0.83,
    "fastv": 0.70,
    "pyramiddrop": 0.78,
    "flashvid": 0.86,
    "vitcop": 0.92,
}
"""Methods, and the accuracy of each at the smallest ratio in units of the full model's."""
BASELINES = ("random", "frame_subsample", "grid", "one_frame", "text_only")
FLOORS = {"one_frame": 0.55, "text_only": 0.35}
KINDS = ("count", "color", "order", "direction")
FULL_ACCURACY = 0.9
LAYERS, TOKENS = 8, 288
QUARTILES = {"": 1.0, "_low": 0.97, "_high": 1.03}
"""Of every cost, in units of its median."""
SMALL = {"vitcop": 0.9, "random": 0.8, "evs": 0.85}
"""Skills of a sweep of few methods."""
HARMLESS_QUESTION = "How many circles?"
NASTY_QUESTION = """<script>document.title = "taken over"</script> Is it "5 > 3" & 'so'?"""


def make_sweep(
    folder: Path,
    *,
    skills: dict[str, float] | None = None,
    ratios: Sequence[float] = RATIOS,
    frame_counts: Sequence[int | None] = (None,),
    questions: int = 240,
    costs: bool = True,
    gallery: bool = True,
    kinds: bool = True,
) -> Path:
    """A sweep of made-up methods; `costs`, `gallery` and `kinds` say which parts it has."""
    skills = SKILLS if skills is None else skills
    cells = [cell for count in frame_counts for cell in cells_of(skills, ratios, count)]
    rng = np.random.default_rng(0)
    difficulty = rng.random(questions)
    rows = pa.Table.from_pylist([row for cell in cells for row in _answers(cell, difficulty, skills, rng)])
    (folder / "answers").mkdir(parents=True)
    half = rows.num_rows // 2
    pq.write_table(rows.slice(0, half), folder / "answers/part-00000.parquet")
    pq.write_table(rows.slice(half), folder / "answers/part-00001.parquet")
    facts = {cell.name: _facts(cell) for cell in cells}
    measured = {cell.name: _costs(cell) for cell in cells} if costs else {}
    table = summarize_cells(cells, rows, facts, measured, "kind" if kinds else None)
    pq.write_table(table, folder / "cells.parquet")
    (folder / "run.json").write_text(json.dumps(_run(ratios)))
    if gallery:
        _write_gallery(folder, [cell for cell in cells if cell.keep_ratio in (0.1, None) and not cell.seed])
    return folder


def cells_of(skills: dict[str, float], ratios: Sequence[float], frames: int | None) -> list[Cell]:
    cells = [Cell(method="none", num_frames=frames)] + [Cell(method=name, num_frames=frames) for name in FLOORS]
    for method in skills:
        for ratio in ratios:
            for seed in range(3) if method == "random" else (None,):
                cells.append(Cell(method=method, keep_ratio=ratio, num_frames=frames, seed=seed))
    return cells


def _accuracy(cell: Cell, skills: dict[str, float]) -> float:
    if cell.method == "none":
        return FULL_ACCURACY
    if cell.method in FLOORS:
        return FLOORS[cell.method]
    loss = (1 - skills[cell.method]) * np.log(cell.keep_ratio or 1) / np.log(0.02)
    return FULL_ACCURACY * (1 - float(loss))


def _answers(
    cell: Cell, difficulty: np.ndarray, skills: dict[str, float], rng: np.random.Generator
) -> list[dict[str, Any]]:
    unreachable = cell.method == "fastv" and (cell.keep_ratio or 1) < 0.15
    noise = (
        0 if cell.method in ("none", "evs") and cell.keep_ratio in (None, 0.5) else rng.normal(0, 0.08, len(difficulty))
    )
    accuracy = FULL_ACCURACY if np.isscalar(noise) else _accuracy(cell, skills)
    right = difficulty + noise < accuracy
    return [
        {
            "cell": cell.name,
            "sample_id": f"q{number}",
            "video": f"clip{number // 4}.mp4",
            "clip": f"clip{number // 4}.mp4",
            "kind": KINDS[number % len(KINDS)],
            "correct": None if unreachable else bool(right[number]),
            "prediction": None if unreachable else ("yes" if right[number] else "no"),
            "status": "error" if unreachable else "ok",
            "error_type": "cannot_prune" if unreachable else None,
            "error": "layers before 1 see all tokens, which is 12.5 % of <all>" if unreachable else None,
            "visual_tokens_full": TOKENS,
            "visual_tokens_kept": TOKENS * _kept(cell),
        }
        for number in range(len(difficulty))
    ]


def _kept(cell: Cell) -> float:
    return {"one_frame": 1 / 8, "text_only": 0.0}.get(cell.method, cell.keep_ratio or 1.0)


def _facts(cell: Cell) -> dict[str, Any]:
    kept = TOKENS * _kept(cell)
    shape = [1.0] * LAYERS
    if cell.method in ("fastv", "pyramiddrop"):
        shape = [1 / _kept(cell)] + [0.9] * (LAYERS - 1)
    elif cell.method in ("vitcop", "flashvid"):
        shape = [1.4] * (LAYERS // 2) + [0.6] * (LAYERS // 2)
    return {
        "settings": f"{cell.method}(retention_ratio={cell.keep_ratio})",
        "query_aware": cell.method in ("fastv", "pyramiddrop"),
        "baseline": cell.method in BASELINES,
        "kept_per_layer": [round(kept * part) for part in shape],
        "kv_bytes": 4096.0 * kept + 50_000,
        "macs_vision": 2e9,
        "macs_language": 1e9 + 6e6 * kept * 8,
        "flops_total": 2 * (3e9 + 6e6 * kept * 8),
    }


def _costs(cell: Cell) -> dict[str, Any]:
    selection = 0.0 if cell.method == "none" else 0.002 + 0.001 * (len(cell.method) % 4)
    medians = {"vision": 0.02, "selection": selection, "prefill": 0.004 + 0.05 * _kept(cell), "generate": 0.01}
    medians |= {"total": sum(medians.values()), "per_token": 0.005}
    seconds = {f"seconds_{name}{end}": by * value for name, value in medians.items() for end, by in QUARTILES.items()}
    return seconds | {
        "seconds_decode": 0.03,
        **{
            f"videos_per_second{end}": 1 / (by * medians["total"])
            for end, by in zip(QUARTILES, (1, 1.03, 0.97), strict=True)
        },
        "peak_memory_bytes": int(2e8 + 4e7 * _kept(cell)) if cell.method != "grid" else None,
        "cost_runs": 12,
        "cost_rounds": 3,
    }


def _run(ratios: Sequence[float]) -> dict[str, Any]:
    sweep = {"keep_ratios": list(ratios), "seeds": 3, "cost_clips": 4, "cost_rounds": 3, "gallery_ratio": 0.1}
    return {
        "state": "finished",
        "started": "2026-11-20T10:00:00+00:00",
        "versions": {"python": "3.11.2", "torch": "2.13"},
        "config": {
            "input": {"manifest": "data/<held>/q.jsonl"},
            "model": {"model": "tiny <model>"},
            "frames": {"num_frames": None, "fps": None},
            "sweep": sweep,
        },
        "fingerprint": {"frames": {"num_frames": 8, "fps": None}},
    }


def _write_gallery(folder: Path, cells: Sequence[Cell]) -> None:
    rng = np.random.default_rng(1)
    (folder / "gallery").mkdir()
    clips = []
    for number, question in enumerate((HARMLESS_QUESTION, NASTY_QUESTION)):
        arrays = {"frames": _frames(rng, brightness=40 + 130 * number)}
        entries = [_gallery_cell(cell, arrays, rng) for cell in cells if cell.method != "fastv"]
        np.savez(folder / f"gallery/{number:02}.npz", **arrays)
        clips.append(
            {
                "file": f"gallery/{number:02}.npz",
                "video": f"clip{number}.mp4",
                "question": question,
                "options": ["one", "<b>two</b>"] if number else None,
                "answer": "one",
                "grid": [6, 6],
                "token_frames": 8,
                "cells": entries,
            }
        )
    (folder / "gallery.json").write_text(json.dumps(clips))


def _gallery_cell(cell: Cell, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
    counts = {} if cell.method == "none" else {"vision": round(TOKENS * _kept(cell))}
    if cell.method in ("vitcop", "flashvid"):
        counts = {"vision": 60, "shallow": 30, "deep": 9} if cell.method == "vitcop" else {"vision": 36, "layer 5": 12}
    stages = {}
    left = np.arange(TOKENS)
    for stage, count in counts.items():
        left = np.sort(rng.choice(left, count, replace=False))
        stages[stage] = f"{cell.name}/{stage}"
        arrays[stages[stage]] = left
    right = bool(rng.random() < 0.6)
    prediction = "" if cell.method == "text_only" else "one" if right else "<i>two</i>"
    return {
        "cell": cell.name,
        "method": cell.method,
        "keep_ratio": cell.keep_ratio,
        "prediction": prediction,
        "correct": None if cell.method == "grid" else right,
        "stages": stages,
    }


def _frames(rng: np.random.Generator, brightness: int) -> np.ndarray:
    """Eight frames (8, 96, 96, 3) on which a disc moves."""
    rows, columns = np.mgrid[:96, :96]
    frames = np.clip(rng.normal(brightness, 14, (8, 96, 96, 3)), 0, 255).astype(np.uint8)
    for time, frame in enumerate(frames):
        frame[(rows - 30 - 4 * time) ** 2 + (columns - 20 - 7 * time) ** 2 < 100] = (230, 150, 30)
        frame[60:74, 10:24] = (60, 120, 230)
    return frames


def cells_with(folder: Path, changes: dict[str, dict[str, object]]) -> Path:
    """Rewrites columns of some cells."""
    file = folder / "cells.parquet"
    table = pq.read_table(file)
    rows = [row | changes.get(row["cell"], {}) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    return folder


def write_answers(folder: Path, right: dict[str, list[bool]]) -> None:
    """Replaces who was right where."""
    shutil.rmtree(folder / "answers")
    (folder / "answers").mkdir()
    rows = [
        {"cell": cell, "sample_id": str(number), "video": "v", "correct": each}
        for cell, values in right.items()
        for number, each in enumerate(values)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "answers/part-00000.parquet")
    means = {cell: {"accuracy": sum(values) / len(values)} for cell, values in right.items()}
    cells_with(folder, means)
