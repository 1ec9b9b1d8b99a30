"""Writes the sampled frames of a file, or a contact sheet of them, and prints one line of JSON.

python -m pipeline.video clip.mp4 --num-frames 8 --out frames.npz
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from pipeline.video.decode import DecodedVideo, decode
from pipeline.video.sampling import Sampling
from pipeline.video.sheet import save_contact_sheet, thumbnail_size


def parse_output(words: list[str]) -> Path:
    """A path that says by its suffix what is written.

    Raises:
        ValueError: it ends in neither .npz nor .png.
    """
    path = Path(words[0])
    if path.suffix not in (".npz", ".png"):
        raise ValueError(f"{words[0]!r} must end in .npz (frames) or .png (contact sheet)")
    return path


def parse_count(words: list[str]) -> int:
    """A whole number above 0.

    Raises:
        ValueError: it is none.
    """
    if not words[0].isdecimal() or int(words[0]) == 0:
        raise ValueError(f"{words[0]!r} must be a number above 0")
    return int(words[0])


def parse_size(words: list[str]) -> tuple[int, int]:
    """`HEIGHTxWIDTH`, or one number for a square, in pixels.

    Raises:
        ValueError: it is neither.
    """
    numbers = words[0].lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"{words[0]!r} must be HEIGHTxWIDTH in pixels, such as 384x384")
    return int(numbers[0]), int(numbers[-1])


def argument(
    metavar: str, parse: Callable[[list[str]], object], show: Callable[[Any], str] = str
) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """An argument of one word that `parse` reads and `show` writes."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: value is not None,
        str_from_instance=lambda value: [show(value)],
    )


Output = Annotated[Path, argument("FILE", parse_output)]
Count = Annotated[int, argument("N", parse_count)]
FrameShape = Annotated[tuple[int, int], argument("HxW", parse_size, lambda size: "x".join(map(str, size)))]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which frames of which file, and where they go."""

    file: tyro.conf.Positional[str]
    """Video file."""
    num_frames: int | None = None
    """This many frames, spread evenly. None: 8, unless --fps is given."""
    fps: float | None = None
    """Frames per second of the video, instead of a number of frames."""
    max_frames: int | None = None
    """Never more than this many frames, thinned evenly."""
    min_frames: int = 1
    """Fail below this many whole frames."""
    sampling: Literal["uniform", "keyframes"] = "uniform"
    """keyframes: the keyframe nearest to each of these frames, far cheaper to decode."""
    start: float | None = None
    """First second of the span, on the file's own clock."""
    end: float | None = None
    """Last second of the span."""
    size: FrameShape | None = None
    """Size of the frames. None: the video's own; on a sheet 320 at most."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """auto: decord for the containers it reads exactly, PyAV for the others."""
    threads: Count = 1
    """Groups of pictures that PyAV decodes side by side."""
    out: Output | None = None
    """X.npz: frames, indices, timestamps; X.png: a sheet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 after one line on stderr when the file or a setting is no good."""
    options = tyro.cli(Options, args=arguments, prog="python -m pipeline.video", description=__doc__.split("\n\n")[0])
    try:
        line = _run(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(line))
    return 0


def _run(options: Options) -> dict[str, object]:
    """Decode, write the output file, and describe what was decoded."""
    sampling = Sampling(
        num_frames=8 if options.num_frames is None and options.fps is None else options.num_frames,
        fps=options.fps,
        max_frames=options.max_frames,
        start=options.start,
        end=options.end,
        min_frames=options.min_frames,
        mode=options.sampling,
    )
    sheet = options.out is not None and options.out.suffix == ".png"
    # Frames for looking at are small; frames in a file have the size of the video.
    size = options.size or (thumbnail_size if sheet else None)
    decoded = decode(options.file, sampling, size, options.decoder, options.threads)
    if options.out is not None:
        _write(decoded, options.out)
    return {
        "video": options.file,
        "codec": decoded.codec,
        "frames": decoded.total_frames,
        "fps": decoded.fps,
        "duration": decoded.duration,
        "decoder": decoded.decoder,
        "sampling": decoded.sampling,
        "size": list(decoded.frames.shape[1:3]),
        "requested_frames": decoded.requested_frames,
        "indices": decoded.indices.tolist(),
        "timestamps": decoded.timestamps.round(6).tolist(),
        "lost": list(decoded.lost),
        "truncated": decoded.truncated,
        "clock": decoded.clock,
        "out": None if options.out is None else str(options.out),
    }


def _write(decoded: DecodedVideo, out: Path) -> None:
    if out.suffix == ".npz":
        np.savez(out, frames=decoded.frames, indices=decoded.indices, timestamps=decoded.timestamps)
    else:
        save_contact_sheet(decoded, out)


if __name__ == "__main__":
    sys.exit(main())
