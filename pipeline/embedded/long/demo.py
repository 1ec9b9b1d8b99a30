"""Long clips as files with questions: `python -m pipeline.embedded.long.demo --output DIR --clips N`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.embedded.demo import HELD_OUT, RenderedClip, main, some_of, write_clips
from pipeline.embedded.long.questions import ask, readable
from pipeline.embedded.long.scenes import Scene, render, sample_scene

FRAMES = 64  # of which every second one is seen by a model that takes 32
SIZE = 160
STREAM = 32  # tells these draws from those of the 8-frame model's files


def write_dataset(
    directory: Path, clips: int, questions_per_clip: int | None = None, seed: int = 0, *, size: int = SIZE
) -> Path:
    """Render `clips` H.264 files of 8 s and write `manifest.jsonl` beside them; returns the manifest's path.

    Rows are those of `pipeline.embedded.demo.write_dataset`, and `camera` (static, pan or cuts).
    """
    return write_clips(directory, (_render_clip(clip, questions_per_clip, seed, size) for clip in range(clips)))


def held_out_scene(seed: int, clip: int) -> tuple[Scene, np.ndarray, np.random.Generator]:
    """A scene that no training step draws, the times of its file's frames, and the generator for its questions."""
    rng = np.random.default_rng((HELD_OUT, seed, clip, STREAM))
    times = np.arange(FRAMES) / FRAMES
    while not readable(scene := sample_scene(rng), times.tolist()):
        pass
    return scene, times, rng


def _render_clip(clip: int, count: int | None, seed: int, size: int) -> RenderedClip:
    scene, times, rng = held_out_scene(seed, clip)
    questions = some_of(list(ask(scene, times.tolist(), rng)), count, rng)
    return RenderedClip(frames=render(scene, times, size)[0], questions=questions, columns={"camera": scene.camera})


if __name__ == "__main__":
    main(write_dataset, __doc__)
