"""A small video question answering set as files: `python -m pipeline.embedded.demo --output DIR --clips N`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np

from pipeline.embedded.questions import ask
from pipeline.embedded.scenes import Scene, render, sample_scene

FRAMES = 32
FPS = 8
SIZE = 192
HELD_OUT = 1_000_003  # training draws from (seed, rank, step), files from (HELD_OUT, seed, clip)


def render_demo(folder: Path, clips: int) -> Path:
    """The manifest of `clips` rendered videos in a folder; they are made once, whole or not at all."""
    if not folder.exists():
        print(f"rendering {clips} videos to {folder.absolute()}", file=sys.stderr)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_dataset(unfinished, clips)
        unfinished.rename(folder)
    return folder / "manifest.jsonl"


def write_dataset(
    directory: Path, clips: int, questions_per_clip: int | None = None, seed: int = 0, *, size: int = SIZE
) -> Path:
    """Render `clips` H.264 files of 4 s and write `manifest.jsonl` beside them; returns the manifest's path.

    Each row holds video (relative to the manifest), sample_id, question, options, answer and kind. A clip gets
    `questions_per_clip` questions of different kinds, at most one per kind; None asks every kind that the scene allows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest = directory / "manifest.jsonl"
    with manifest.open("w") as lines:
        for clip in range(clips):
            for row in _write_clip(directory, clip, questions_per_clip, seed, size):
                lines.write(json.dumps(row) + "\n")
    return manifest


def _write_clip(directory: Path, clip: int, count: int | None, seed: int, size: int) -> list[dict[str, object]]:
    rng = np.random.default_rng((HELD_OUT, seed, clip))
    scene, times = sample_scene(rng), np.arange(FRAMES) / FRAMES
    name = f"clip-{clip:04d}.mp4"
    write_video(directory / name, scene, times, size)
    questions = list(ask(scene, list(times), rng))
    order = sorted(rng.permutation(len(questions))[:count])
    return [
        {
            "video": name,
            "sample_id": f"clip-{clip:04d}-{questions[i].kind}",
            "question": questions[i].text,
            "options": list(questions[i].options),
            "answer": questions[i].answer,
            "kind": questions[i].kind,
        }
        for i in order
    ]


def write_video(path: Path, scene: Scene, times: np.ndarray, size: int = SIZE) -> None:
    """Encode a scene with libx264 (yuv420p, crf 23, no B-frames, hence no edit list)."""
    frames, _ = render(scene, times, size)
    options = {"crf": "23", "preset": "veryfast", "bf": "0", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for frame in np.round(frames).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--questions-per-clip", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_dataset(arguments.output, arguments.clips, arguments.questions_per_clip, arguments.seed))


if __name__ == "__main__":
    main()
