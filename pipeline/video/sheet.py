"""A contact sheet: the frames of a clip as one picture to look at."""

import math
from pathlib import Path

from pipeline.video.decode import DecodedVideo


def save_contact_sheet(decoded: DecodedVideo, out: Path) -> None:
    """Write all frames as one picture, in a grid about as wide as high, each with its index and time below it."""
    from PIL import Image, ImageDraw

    count, height, width = decoded.frames.shape[:3]
    caption = 14  # pixels
    columns = min(count, math.ceil(math.sqrt(count * (height + caption) / width)))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (frame, index, seconds) in enumerate(
        zip(decoded.frames, decoded.indices, decoded.timestamps, strict=True)
    ):
        left, top = place % columns * width, place // columns * (height + caption)
        sheet.paste(Image.fromarray(frame), (left, top))
        draw.text((left + 2, top + height + 1), f"{index}  {seconds:.2f} s", fill="black")
    sheet.save(out)


def thumbnail_size(height: int, width: int, num_frames: int) -> tuple[int, int]:
    """(height, width) of a frame on a sheet: its shape kept, 320 pixels at most either way, never enlarged."""
    scale = min(1.0, 320 / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
