"""Small videos for tests: every frame carries its number, so that a wrong frame can be told from the right one."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 10


def numbered_frame(number: int, height: int = 96, width: int = 160) -> np.ndarray:
    """(H, W, 3) uint8: a row of bright and dark cells that spells the number, its complement below, then a texture."""
    frame = np.empty((height, width, 3), dtype=np.uint8)
    bits = (number >> np.arange(BITS)) & 1
    cells = np.repeat(bits, -(-width // BITS))[:width]
    frame[: height // 3] = np.where(cells, 220, 30)[:, None]
    frame[height // 3 : 2 * height // 3] = np.where(cells, 30, 220)[:, None]
    x, y = np.meshgrid(np.arange(width), np.arange(height - 2 * height // 3))
    drift = np.stack([x * 2 + number * 3, y * 5 - number * 2, x + y + number], axis=-1)
    frame[2 * height // 3 :] = 128 + 100 * np.sin(drift / 9)
    return frame


def read_number(frame: np.ndarray) -> int | None:
    """The number of an upright numbered frame (H, W, 3) of any size; None when it cannot be read."""
    height, width = frame.shape[:2]
    grey = frame.astype(np.float32).mean(axis=-1)
    number = 0
    for bit in range(BITS):
        cell = -(-width // BITS)
        columns = slice(bit * cell + cell // 3, bit * cell + 2 * cell // 3 + 1)
        upper = grey[height // 12 : height // 4, columns].mean()
        lower = grey[5 * height // 12 : 7 * height // 12, columns].mean()
        if abs(upper - lower) < 80:
            return None
        number |= int(upper > lower) << bit
    return number


def write_video(
    path: Path,
    frames: int = 60,
    *,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    size: tuple[int, int] = (96, 160),
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    quarter_turns: int = 0,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Encode numbered frames 0 .. frames-1 at 25 frames a second, or at the given times.

    Args:
        times: presentation time of each frame in milliseconds.
        size: (height, width) of the upright picture.
        quarter_turns: the picture is stored turned by this many quarter turns clockwise, and marked to be turned back.
    """
    unit = Fraction(1, 25) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1", **(options or {})})
        stream.height, stream.width = size[::-1] if quarter_turns % 2 else size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = unit
        if quarter_turns:
            stream.set_display_rotation(90 * quarter_turns)
        for number, time in enumerate(range(frames) if times is None else times):
            picture = np.rot90(numbered_frame(number, *size), -quarter_turns)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_without_decoding(source: Path, path: Path, first: int) -> Path:
    """Copy packets so that presentation begins at frame `first` (25 frames a second).

    Packets before it are kept as decoding needs them, and hidden by an edit list: what `ffmpeg -ss T -c copy` does.
    """
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        track = old.streams.video[0]
        stream = new.add_stream_from_template(track)
        shift = int(first / 25 / track.time_base)
        for packet in old.demux(track):
            if packet.size:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = stream
                new.mux(packet)
    return path
