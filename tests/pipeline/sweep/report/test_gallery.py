"""Which tokens were kept, drawn on frames."""

import json
from pathlib import Path

import numpy as np

from pipeline.sweep.report.gallery import CLEAR, DROPPED, RIM, _mask, read_gallery


def test_a_mask_clears_rims_and_darkens() -> None:
    mask = _mask(np.array([[True, False]]), 4)
    assert mask.shape == (4, 8)
    assert (mask[:, 4:] == DROPPED).all() and (mask[1:3, 1:3] == CLEAR).all()
    assert (mask[[0, 3], :4] == RIM).all() and (mask[:, [0, 3]] == RIM).all()


def test_the_gallery_has_a_row_for_each_stage(folder: Path) -> None:
    clips = json.loads((folder / "gallery.json").read_text())
    drawn = read_gallery(folder)
    assert [len(clip.cells) for clip in drawn] == [len(clip["cells"]) for clip in clips]
    rows = sum(max(len(cell["stages"]), 1) for clip in clips for cell in clip["cells"])
    assert sum(len(cell.stages) for clip in drawn for cell in clip.cells) == rows
    assert (folder / "report.html").read_text().count('class="strip"') == rows


def test_a_sweep_without_a_gallery_has_none(tmp_path: Path) -> None:
    assert read_gallery(tmp_path) == []
