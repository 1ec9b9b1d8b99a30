"""The contact sheet shows every frame, small enough to look at."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.video import Sampling, decode
from pipeline.video.sheet import save_contact_sheet, thumbnail_size
from tests.pipeline.video.cases import Make
from tests.pipeline.videos import read_number


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (6, 2, 3), (7, 3, 3), (12, 4, 3)])
def test_frames_stand_in_reading_order(make: Make, tmp_path: Path, count: int, rows: int, columns: int) -> None:
    decoded = decode(make("closed.mp4"), Sampling(num_frames=count))
    save_contact_sheet(decoded, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    high, wide = sheet.shape[0] // rows, sheet.shape[1] // columns  # a caption is part of each cell
    assert wide == 160 and high > 96
    cells = [(high * (i // columns), wide * (i % columns)) for i in range(count)]
    shown = [read_number(sheet[top : top + 96, left : left + 160]) for top, left in cells]
    assert shown == decoded.indices.tolist()


@pytest.mark.parametrize(
    ("source", "size"),
    [((90, 160), (90, 160)), ((1080, 1920), (180, 320)), ((2000, 2), (320, 1)), ((320, 320), (320, 320))],
)
def test_thumbnails_keep_their_shape_and_are_never_enlarged(source: tuple[int, int], size: tuple[int, int]) -> None:
    assert thumbnail_size(*source, 8) == size
