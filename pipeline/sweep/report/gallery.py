"""Which tokens each method kept, drawn on the frames of a few clips.

Reads `gallery.json`, a list of clips::

    {"file": "gallery/00.npz",         # relative to the sweep's folder
     "video": "clip.mp4",
     "question": "...", "options": ["...", ...] or null, "answer": "..." or null,
     "grid": [h, w],                   # visual tokens of a frame, rows and columns, before any pruning
     "token_frames": 8,                # frames that have tokens, T or fewer; left out: T
     "cells": [{"cell": "vitcop-0.1", "method": "vitcop", "keep_ratio": 0.1 or null,
                "prediction": "...", "correct": true, false or null,
                "stages": {"vision": "vitcop-0.1/vision", ...}}]}   # stage -> key in the npz, in order

and of each clip the npz with `frames`, uint8 (T, H, W, 3), and under the keys of the stages int arrays (K,) of the
tokens that were left after the stage: `t * (h * w) + y * w + x` with t in [0, token_frames). Where a token covers
several frames (temporal patches), all but the last do so of equally many, and the first of them is drawn. A cell
without stages kept all.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.sweep.cells import FULL
from pipeline.sweep.report.data import rank
from pipeline.sweep.report.words import share

GALLERY_FILE = "gallery.json"
MOST_FRAMES = 8
FRAME_HEIGHT = 112
LEAST_CELL, MOST_CELL = 4, 9
"""Pixels that a token's side takes in a mask."""
GAP = 3
"""Pixels of a mask between frames."""
CLEAR, DROPPED, RIM = range(3)
MASK_COLOURS = bytes((0, 0, 0, 8, 10, 16, 255, 255, 255))
MASK_OPACITY = bytes((0, 180, 200))


@dataclass(frozen=True)
class Stage:
    """What was left after one stage of pruning.

    Attributes:
        kept: "31 of 288".
        drawing: SVG of the frames with the kept tokens.
    """

    name: str
    kept: str
    drawing: str


@dataclass(frozen=True)
class Shown:
    """A cell of the sweep on one clip.

    Attributes:
        ratio: keep ratio as people say it; empty where there is none.
        correct: whether the prediction was right; None where that is not known.
    """

    method: str
    name: str
    ratio: str
    prediction: str
    correct: bool | None
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class GalleryClip:
    """A clip of the gallery.

    Attributes:
        picture: id of the picture of its frames in the page.
        href: that picture as a data URL, of `size` pixels.
        frames: how many frames are drawn, of `token_frames`.
    """

    video: str
    question: str
    options: tuple[str, ...]
    answer: str
    picture: str
    href: str
    size: tuple[int, int]
    frames: int
    token_frames: int
    cells: tuple[Shown, ...]


def read_gallery(folder: Path) -> list[GalleryClip]:
    """The gallery's clips, drawn; empty when the sweep has no gallery."""
    file = folder / GALLERY_FILE
    clips = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [_clip(folder, number, clip) for number, clip in enumerate(clips)]


def _clip(folder: Path, number: int, clip: Mapping[str, Any]) -> GalleryClip:
    with np.load(folder / clip["file"]) as arrays:
        frames = arrays["frames"]
        token_frames = clip.get("token_frames") or len(frames)
        # (S,) frames that are drawn, evenly spread when there are more than fit
        shown = np.unique(np.linspace(0, token_frames - 1, min(token_frames, MOST_FRAMES)).round().astype(int))
        # Tokens that cover several frames (temporal patches) are drawn on the first of them.
        canvas = Canvas(f"clip-{number}", (token_frames, *clip["grid"]), shown)
        step = math.ceil(len(frames) / token_frames)
        cells = sorted(clip["cells"], key=lambda cell: (rank(cell["method"]), cell["cell"]))
        return GalleryClip(
            video=Path(clip["video"]).name,
            question=clip["question"],
            options=tuple(clip["options"] or ()),
            answer="not given" if clip["answer"] is None else clip["answer"],
            picture=canvas.name,
            href=canvas.strip(frames[np.minimum(shown * step, len(frames) - 1)]),
            size=canvas.size,
            frames=len(shown),
            token_frames=token_frames,
            cells=tuple(_shown(cell, arrays, canvas) for cell in cells),
        )


def _shown(cell: Mapping[str, Any], arrays: Mapping[str, np.ndarray], canvas: Canvas) -> Shown:
    total = canvas.kept.size
    stages = {stage: arrays[key] for stage, key in cell["stages"].items()} or {"": np.arange(total)}
    full = cell["method"] == FULL
    return Shown(
        method=cell["method"],
        name="all tokens" if full else cell["method"],
        ratio="" if full or cell["keep_ratio"] is None else share(cell["keep_ratio"]),
        prediction=cell["prediction"],
        correct=cell["correct"],
        stages=tuple(
            Stage(stage, f"{len(index):,} of {total:,}", canvas.drawing(index)) for stage, index in stages.items()
        ),
    )


class Canvas:
    """A clip's frames side by side, and masks that fit them to the pixel.

    Args:
        name: id of the picture in the page.
        grid: tokens before any pruning: frames, rows, columns.
        shown: which of these frames are drawn.
    """

    def __init__(self, name: str, grid: tuple[int, int, int], shown: np.ndarray) -> None:
        self.name = name
        self.kept = np.zeros(grid, dtype=bool)
        self.shown = shown
        self.cell = int(np.clip(FRAME_HEIGHT // grid[1], LEAST_CELL, MOST_CELL))
        self.scale = max(FRAME_HEIGHT // (grid[1] * self.cell), 1)
        width, height = grid[2] * self.cell, grid[1] * self.cell
        self.frame_size = width * self.scale, height * self.scale
        self.size = ((width + GAP) * len(shown) - GAP) * self.scale, height * self.scale

    def strip(self, frames: np.ndarray) -> str:
        """A picture of the frames (shown, H, W, 3), as a data URL."""
        picture = Image.new("RGBA", self.size)
        for number, frame in enumerate(frames):
            left = number * (self.frame_size[0] + GAP * self.scale)
            picture.paste(Image.fromarray(frame).resize(self.frame_size), (left, 0))
        return _data_url(picture)

    def drawing(self, index: np.ndarray) -> str:
        """SVG: the frames under a mask that darkens what was dropped and rims the kept tokens (K,)."""
        kept = np.zeros_like(self.kept)
        kept.reshape(-1)[index] = True
        # Frames side by side with a gap between them, so there is a gap before each but the first.
        between = np.full((kept.shape[1] * self.cell, GAP), CLEAR, dtype=np.uint8)
        columns = [part for frame in kept[self.shown] for part in (between, _mask(frame, self.cell))]
        mask = Image.fromarray(np.hstack(columns[1:]))
        mask.putpalette(MASK_COLOURS)
        width, height = self.size
        return (
            f'<svg class="strip" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{kept[self.shown].sum()} tokens kept"><use href="#{self.name}"/>'
            f'<image class="mask" preserveAspectRatio="none" href="{_data_url(mask, transparency=MASK_OPACITY)}" '
            f'width="{width}" height="{height}"/></svg>'
        )


def _mask(kept: np.ndarray, cell: int) -> np.ndarray:
    """Palette numbers (h * cell, w * cell) for the kept tokens (h, w) of a frame."""
    large = np.kron(kept, np.ones((cell, cell), dtype=bool))
    padded = np.pad(large, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.where(large, np.where(inner, CLEAR, RIM), DROPPED).astype(np.uint8)


def _data_url(image: Image.Image, **options: bytes) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
