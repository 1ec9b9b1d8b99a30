"""A small video question answering set as files: `python -m pipeline.embedded.demo --output DIR --clips N`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import tyro

from pipeline.embedded.questions import SceneQuestion, ask
from pipeline.embedded.scenes import Scene, render, sample_scene

FRAMES = 32
FPS = 8
SIZE = 192
HELD_OUT = 1_000_003  # training draws from (seed, rank, step), files from (HELD_OUT, seed, clip)


def render_demo(folder: Path, clips: int, write: Callable[[Path, int], Path] | None = None) -> Path:
    """The manifest of `clips` rendered videos in a folder; they are made once, whole or not at all.

    `write` writes them, for other scenes than this module's.
    """
    if not folder.exists():
        print(f"rendering {clips} videos to {folder.absolute()}", file=sys.stderr)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        (write or write_dataset)(unfinished, clips)
        unfinished.rename(folder)
    return folder / "manifest.jsonl"


def write_dataset(
    directory: Path, clips: int, questions_per_clip: int | None = None, seed: int = 0, *, size: int = SIZE
) -> Path:
    """Render `clips` H.264 files of 4 s and write `manifest.jsonl` beside them; returns the manifest's path.

    Each row holds video (relative to the manifest), sample_id, question, options, answer and kind. A clip gets
    `questions_per_clip` questions of different kinds, at most one per kind; None asks every kind that the scene allows.
    """
    return write_clips(directory, (_render_clip(clip, questions_per_clip, seed, size) for clip in range(clips)))


@dataclass(frozen=True, kw_only=True)
class RenderedClip:
    """frames (n, H, W, 3) in [0, 255], and what is asked about them; `columns` are added to every row."""

    frames: np.ndarray
    questions: Sequence[SceneQuestion]
    columns: Mapping[str, object] = field(default_factory=dict)


def write_clips(directory: Path, clips: Iterable[RenderedClip]) -> Path:
    """Encode every clip and write `manifest.jsonl` beside the files; returns the manifest's path."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest = directory / "manifest.jsonl"
    with manifest.open("w") as lines:
        for number, clip in enumerate(clips):
            name = f"clip-{number:04d}"
            encode_video(directory / f"{name}.mp4", clip.frames)
            for question in clip.questions:
                row: dict[str, object] = {
                    "video": f"{name}.mp4",
                    "sample_id": f"{name}-{question.kind}",
                    "question": question.text,
                    "options": list(question.options),
                    "answer": question.answer,
                    "kind": question.kind,
                }
                lines.write(json.dumps({**row, **clip.columns}) + "\n")
    return manifest


def _render_clip(clip: int, count: int | None, seed: int, size: int) -> RenderedClip:
    rng = np.random.default_rng((HELD_OUT, seed, clip))
    scene, times = sample_scene(rng), np.arange(FRAMES) / FRAMES
    questions = some_of(list(ask(scene, list(times), rng)), count, rng)
    return RenderedClip(frames=render(scene, times, size)[0], questions=questions)


def some_of(questions: list[SceneQuestion], count: int | None, rng: np.random.Generator) -> list[SceneQuestion]:
    """At most `count` of the questions, chosen at random, in their order; None takes all."""
    return [questions[i] for i in sorted(rng.permutation(len(questions))[:count])]


def write_video(path: Path, scene: Scene, times: np.ndarray, size: int = SIZE) -> None:
    """Render a scene and encode it."""
    encode_video(path, render(scene, times, size)[0])


def encode_video(path: Path, frames: np.ndarray) -> None:
    """Encode frames (n, H, W, 3) in [0, 255] with libx264 (yuv420p, crf 23, no B-frames, hence no edit list)."""
    options = {"crf": "23", "preset": "veryfast", "bf": "0", "threads": "1"}
    height, width = frames.shape[1:3]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in np.round(frames).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main(write: Callable[[Path, int, int, int], Path] = write_dataset, description: str | None = __doc__) -> None:
    """The command line of this module, and of others that write clips."""

    def command(output: Path, clips: int = 24, questions_per_clip: int = 8, seed: int = 0) -> None:
        """Write clips and their manifest.

        Args:
            output: the folder for them.
            clips: how many.
            questions_per_clip: of different kinds, at most.
            seed: of the scenes and questions.
        """
        print(write(output, clips, questions_per_clip, seed))

    tyro.cli(command, description=description)


if __name__ == "__main__":
    main()
