"""Exact frames of a video file at the model's size.

Frame i is the i-th frame that a player shows, with its own presentation time. As a program this writes the frames, or a
contact sheet of them, and prints one line of JSON:

    python -m pipeline.video clip.mp4 --num-frames 8 --out frames.npz
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.video.container import VideoError, VideoInfo, probe
from pipeline.video.decoders import DecordError, Pictures, read_with_decord, read_with_pyav
from pipeline.video.sampling import Sampling, sample_indices
from pipeline.video.size import ShapeError

Decoder = Literal["auto", "decord", "pyav"]
Size = tuple[int, int] | Callable[[int, int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """The sampled frames of one video.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB, upright, at the asked size.
        indices: (T,) int64, places in presentation order.
        timestamps: (T,) float64, presentation times in seconds on the file's own clock.
        start_time: the first frame of the whole video on that clock; rarely 0 in MPEG-TS.
        fps: average frames a second of the whole video.
        total_frames: frames in the whole video.
        duration: seconds of the whole video.
        decoder: "decord" or "pyav", the one that made the frames.
        requested_frames: how many frames the sampling asked for, before caps and the video's own length.
        lost: sampled indices that could not be decoded whole and are left out.
        truncated: the file holds less than its header promises.
    """

    frames: np.ndarray
    indices: np.ndarray
    timestamps: np.ndarray
    start_time: float
    fps: float
    total_frames: int
    duration: float
    codec: str
    decoder: str
    requested_frames: int
    lost: tuple[int, ...]
    truncated: bool

    @property
    def times(self) -> list[float]:
        """(T,) seconds of each frame from the start of the video."""
        return (self.timestamps - self.start_time).tolist()

    @property
    def damaged(self) -> bool:
        """Frames are missing: of those sampled, or at the end of the file."""
        return bool(self.lost) or self.truncated


def decode(
    path: str | os.PathLike[str], sampling: Sampling, size: Size | None = None, decoder: Decoder = "auto"
) -> DecodedVideo:
    """Decode the sampled frames of a file.

    A damaged video yields the frames that are whole; the others are listed in `lost`.

    Args:
        size: (height, width) of the frames; or a function of the upright source's height, its width and the number of
            sampled frames that gives it; or None for the source's own size. Frames are resized (bicubic) one by one as
            they are decoded.
        decoder: "auto" takes decord for files on which it is exact, and PyAV for the others and when decord fails.

    Raises:
        VideoError: the file cannot be used, or fewer than `sampling.min_frames` of its frames are whole.
    """
    (video,) = decode_each(path, [sampling], size, decoder)
    return video


def decode_each(
    path: str | os.PathLike[str],
    samplings: Sequence[Sampling],
    size: Size | None = None,
    decoder: Decoder = "auto",
) -> list[DecodedVideo]:
    """As `decode`, for several samplings of one file; frames of the same size are read once for all of them.

    Raises:
        VideoError: as `decode`, for any of the samplings.
    """
    info = probe(path)
    wanted = [(sampling, *sample_indices(info, sampling)) for sampling in samplings]
    sizes = [_resolve(size, info, len(indices)) for _, indices, _ in wanted]
    read = {}
    for shape in set(sizes):
        chosen = [indices for (_, indices, _), its_size in zip(wanted, sizes, strict=True) if its_size == shape]
        read[shape] = _read(info, np.unique(np.concatenate(chosen)), *shape, decoder)
    return [_sampled(info, *each, *read[shape]) for each, shape in zip(wanted, sizes, strict=True)]


def _sampled(
    info: VideoInfo, sampling: Sampling, indices: np.ndarray, requested: int, pictures: Pictures, used: str
) -> DecodedVideo:
    got = np.array([index for index in indices.tolist() if index in pictures], dtype=np.int64)
    if len(got) < sampling.min_frames:
        raise VideoError(
            "too_few_frames",
            f"{info.path}: {len(got)} of {len(indices)} sampled frames are whole, min_frames={sampling.min_frames}",
        )
    return DecodedVideo(
        frames=np.stack([pictures[index] for index in got.tolist()]),
        indices=got,
        timestamps=info.timestamps[got],
        start_time=float(info.timestamps[0]),
        fps=info.fps,
        total_frames=info.num_frames,
        duration=info.duration,
        codec=info.codec,
        decoder=used,
        requested_frames=requested,
        lost=tuple(index for index in indices.tolist() if index not in pictures),
        truncated=info.truncated,
    )


def _resolve(size: Size | None, info: VideoInfo, num_frames: int) -> tuple[int, int]:
    if not callable(size):
        return size or (info.height, info.width)
    try:
        return size(info.height, info.width, num_frames)
    except ShapeError as error:
        raise VideoError("extreme_shape", f"{info.path}: {error}") from error


def _read(info: VideoInfo, indices: np.ndarray, height: int, width: int, decoder: Decoder) -> tuple[Pictures, str]:
    """Pictures by frame index, and the decoder that made them."""
    if decoder == "decord" or (decoder == "auto" and info.decord_exact):
        try:
            return read_with_decord(info, indices, height, width), "decord"
        except DecordError as error:
            if decoder == "decord":
                raise VideoError("unreadable", f"{info.path}: {error}; decode it with pyav or auto") from error
    return read_with_pyav(info, indices, height, width), "pyav"


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 after one line on stderr when the file or a setting is no good."""
    options = _parser().parse_args(arguments)
    try:
        line = _run(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(line))
    return 0


def _run(options: argparse.Namespace) -> dict[str, object]:
    """Decode, write the output file, and describe what was decoded."""
    sampling = Sampling(
        num_frames=8 if options.num_frames is None and options.fps is None else options.num_frames,
        fps=options.fps,
        max_frames=options.max_frames,
        start=options.start,
        end=options.end,
        min_frames=options.min_frames,
    )
    sheet = options.out is not None and options.out.suffix == ".png"
    decoded = decode(options.file, sampling, options.size or (_thumbnail if sheet else None), options.decoder)
    if options.out is not None:
        _write(decoded, options.out)
    return {
        "video": options.file,
        "codec": decoded.codec,
        "frames": decoded.total_frames,
        "fps": decoded.fps,
        "duration": decoded.duration,
        "decoder": decoded.decoder,
        "size": list(decoded.frames.shape[1:3]),
        "requested_frames": decoded.requested_frames,
        "indices": decoded.indices.tolist(),
        "timestamps": decoded.timestamps.round(6).tolist(),
        "lost": list(decoded.lost),
        "truncated": decoded.truncated,
        "out": None if options.out is None else str(options.out),
    }


def _thumbnail(height: int, width: int, num_frames: int) -> tuple[int, int]:
    """The largest size with the same shape, at most 320 pixels either way, that does not enlarge."""
    scale = min(1.0, 320 / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _write(decoded: DecodedVideo, out: Path) -> None:
    if out.suffix == ".npz":
        np.savez(out, frames=decoded.frames, indices=decoded.indices, timestamps=decoded.timestamps)
    else:
        save_contact_sheet(decoded, out)


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".npz", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .npz (frames) or .png (contact sheet)")
    return path


def _size(text: str) -> tuple[int, int]:
    """Reads `HEIGHTxWIDTH`, or one number for a square."""
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be HEIGHTxWIDTH in pixels, such as 384x384")
    return int(numbers[0]), int(numbers[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.video", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="video file")
    parser.add_argument("--num-frames", type=int, metavar="N", help="N frames spread evenly (default: 8)")
    parser.add_argument("--fps", type=float, metavar="F", help="F frames per second of the video, instead of N frames")
    parser.add_argument("--max-frames", type=int, metavar="N", help="never more than N frames, thinned evenly")
    parser.add_argument("--min-frames", type=int, metavar="N", default=1, help="fail below N whole frames (default: 1)")
    parser.add_argument("--start", type=float, metavar="S", help="first second of the span, on the file's own clock")
    parser.add_argument("--end", type=float, metavar="S", help="last second of the span")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="size of the frames (default: the video's own; on a sheet 320 at most)",
    )
    parser.add_argument("--decoder", choices=("auto", "decord", "pyav"), default="auto", help="(default: auto)")
    parser.add_argument(
        "--out", type=_output, metavar="FILE", help="X.npz: frames, indices, timestamps; X.png: a sheet"
    )
    return parser
