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
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.sweep.cells import FULL
from pipeline.sweep.report.data import rank
from pipeline.sweep.report.html import Html, element, join
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


def gallery_section(folder: Path) -> Html | None:
    """The gallery's clips as foldable blocks, the first one open; None when the sweep has no gallery."""
    file = folder / GALLERY_FILE
    clips = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return join(_clip(folder, number, clip) for number, clip in enumerate(clips)) if clips else None


def _clip(folder: Path, number: int, clip: Mapping[str, Any]) -> Html:
    with np.load(folder / clip["file"]) as arrays:
        frames = arrays["frames"]
        token_frames = clip.get("token_frames") or len(frames)
        shown = np.unique(np.linspace(0, token_frames - 1, min(token_frames, MOST_FRAMES)).round().astype(int))
        canvas = Canvas(f"clip-{number}", (token_frames, *clip["grid"]), shown)
        step = math.ceil(len(frames) / token_frames)
        picture = canvas.strip(frames[np.minimum(shown * step, len(frames) - 1)])
        cells = sorted(clip["cells"], key=lambda cell: (rank(cell["method"]), cell["cell"]))
        rows = [row for cell in cells for row in _cell_rows(cell, arrays, canvas)]
    source = Html(f'<svg class="defs"><defs><image id="{canvas.name}" {picture}/></defs></svg>')
    heads = ("method", "stage", "kept", f"{len(shown)} of {token_frames} frames", "answer")
    header = element("tr", *(element("th", title) for title in heads))
    body = element("table", element("thead", header), element("tbody", *rows), class_="gallery")
    summary = element("summary", element("b", clip["question"]), " ", element("small", Path(clip["video"]).name))
    return element("details", summary, source, _question(clip), element("div", body, class_="scroll"), open=number == 0)


def _question(clip: Mapping[str, Any]) -> Html:
    options = element("li", "Options: " + " · ".join(clip["options"])) if clip["options"] else Html()
    answer = "not given" if clip["answer"] is None else clip["answer"]
    return element("ul", options, element("li", "Right answer: ", element("b", answer)), class_="question")


def _cell_rows(cell: Mapping[str, Any], arrays: Mapping[str, np.ndarray], canvas: Canvas) -> Iterable[Html]:
    """One row for each stage; the method and its answer span them."""
    total = canvas.kept.size
    stages = {stage: arrays[key] for stage, key in cell["stages"].items()} or {"": np.arange(total)}
    ratio = f" {share(cell['keep_ratio'])}" if cell["keep_ratio"] is not None and cell["method"] != FULL else ""
    name = "all tokens" if cell["method"] == FULL else cell["method"]
    for number, (stage, index) in enumerate(stages.items()):
        first = [element("th", name, element("small", ratio), rowspan=len(stages), scope="row")] * (number == 0)
        last = [element("td", _verdict(cell), rowspan=len(stages))] * (number == 0)
        count = element("td", f"{len(index):,} of {total:,}")
        row = (*first, element("td", stage), count, element("td", canvas.drawing(index)), *last)
        yield element("tr", *row, data_method=cell["method"], class_=None if number else "first")


def _verdict(cell: Mapping[str, Any]) -> Html:
    marks = {True: ("right", "✓ right: "), False: ("wrong", "✗ wrong: "), None: (None, "")}
    kind, mark = marks[cell["correct"]]
    return element("span", mark, element("q", cell["prediction"]) if cell["prediction"] else "(empty)", class_=kind)


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
        """Attributes of an image with the frames (shown, H, W, 3)."""
        picture = Image.new("RGBA", self.size)
        for number, frame in enumerate(frames):
            left = number * (self.frame_size[0] + GAP * self.scale)
            picture.paste(Image.fromarray(frame).resize(self.frame_size), (left, 0))
        return f"{_href(picture)} {self._box}"

    def drawing(self, index: np.ndarray) -> Html:
        """The frames under a mask that darkens what was dropped and rims the kept tokens (K,)."""
        kept = np.zeros_like(self.kept)
        kept.reshape(-1)[index] = True
        between = np.full((kept.shape[1] * self.cell, GAP), CLEAR, dtype=np.uint8)
        columns = [part for frame in kept[self.shown] for part in (between, _mask(frame, self.cell))]
        mask = Image.fromarray(np.hstack(columns[1:]))
        mask.putpalette(MASK_COLOURS)
        href = _href(mask, transparency=MASK_OPACITY)
        return Html(
            f'<svg class="strip" viewBox="0 0 {self.size[0]} {self.size[1]}" role="img" '
            f'aria-label="{kept[self.shown].sum()} tokens kept"><use href="#{self.name}"/>'
            f'<image class="mask" preserveAspectRatio="none" {href} {self._box}/></svg>'
        )

    @property
    def _box(self) -> str:
        return f'width="{self.size[0]}" height="{self.size[1]}"'


def _mask(kept: np.ndarray, cell: int) -> np.ndarray:
    """Palette numbers (h * cell, w * cell) for the kept tokens (h, w) of a frame."""
    large = np.kron(kept, np.ones((cell, cell), dtype=bool))
    padded = np.pad(large, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.where(large, np.where(inner, CLEAR, RIM), DROPPED).astype(np.uint8)


def _href(image: Image.Image, **options: bytes) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return f'href="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"'
