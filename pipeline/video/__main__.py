"""Writes the sampled frames of a file, or a contact sheet of them, and prints one line of JSON.

python -m pipeline.video clip.mp4 --num-frames 8 --out frames.npz
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.video.decode import DecodedVideo, decode
from pipeline.video.sampling import Sampling
from pipeline.video.sheet import save_contact_sheet, thumbnail_size


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


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".npz", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .npz (frames) or .png (contact sheet)")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return int(text)


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
    parser.add_argument(
        "--sampling",
        choices=("uniform", "keyframes"),
        default="uniform",
        help="keyframes: the keyframe nearest to each of these frames, far cheaper to decode (default: uniform)",
    )
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
        "--threads", type=_count, metavar="N", default=1, help="groups of pictures that PyAV decodes side by side"
    )
    parser.add_argument(
        "--out", type=_output, metavar="FILE", help="X.npz: frames, indices, timestamps; X.png: a sheet"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
