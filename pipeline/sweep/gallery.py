"""The gallery of a sweep: frames of a few clips, and which tokens each method kept of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import SweepJobConfig
from pipeline.manifest import Clip
from pipeline.sweep.cells import Cell

if TYPE_CHECKING:
    from pipeline.sweep.costs import Measured  # with torch, which --help can do without


def write_gallery(
    config: SweepJobConfig, output: Path, cells: Sequence[Cell], measured: Sequence[tuple[Clip, Measured]]
) -> None:
    """Writes `gallery.json`, and an npz with frames and kept tokens for each clip.

    Args:
        measured: clips, each with what `SweepMeasurer` found on it.
    """
    # Cells at the ratio nearest to the one asked for, with the first frame count and the first seed.
    ratio = min(config.sweep.keep_ratios, key=lambda one: abs(one - config.sweep.gallery_ratio))
    first_count = cells[0].num_frames
    chosen = [
        cell for cell in cells if cell.num_frames == first_count and cell.keep_ratio in (None, ratio) and not cell.seed
    ]
    (output / "gallery").mkdir(exist_ok=True)
    clips = []
    for number, (clip, found) in enumerate(measured):
        file, row = f"gallery/{number:02d}.npz", clip.rows[0]
        arrays: dict[str, np.ndarray] = {"frames": found.frames}
        entries = []
        # One array of token indices (K,) for each stage of each cell, under the key CELL/STAGE.
        for cell in chosen:
            if (picture := found.gallery.get(cell.name)) is None:
                continue
            keys = {stage: f"{cell.name}/{stage}" for stage in picture["stages"]}
            arrays |= {keys[stage]: index for stage, index in picture["stages"].items()}
            entry = {"cell": cell.name, "method": cell.method, "keep_ratio": cell.keep_ratio, "stages": keys}
            entries.append(entry | {"prediction": picture["prediction"], "correct": picture["correct"]})
        np.savez_compressed(output / file, **arrays)  # type: ignore[arg-type]
        # Visual tokens before any pruning lie on a grid (frames, height, width).
        frames, height, width = found.grid
        asked = {"question": row.question, "options": row.options, "answer": row.answer}
        place = {"file": file, "video": clip.name, "grid": [height, width], "token_frames": frames}
        clips.append(place | asked | {"cells": entries})
    (output / "gallery.json").write_text(json.dumps(clips, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
