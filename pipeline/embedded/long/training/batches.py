"""Training batches of the long model: clips as pixels with labels of patches and visual tokens, and their text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.embedded.long.questions import CAPTIONS, KINDS, ask, caption, readable
from pipeline.embedded.long.scenes import FRAME_SIZE, LETTERS, SHAPES, Scene, SceneObject, render, sample_scene
from pipeline.embedded.scenes import COLORS, DIRECTIONS, soften
from pipeline.embedded.training.architecture import PATCH_SIZE
from pipeline.embedded.training.batches import (
    CAPTION_KIND,
    IGNORE,
    TextRow,
    cell_owners,
    choose_questions,
    make_segment,
    normalize,
    pack,
)

TOKEN_SIZE = 2 * PATCH_SIZE  # pixels of a frame under one visual token
TOKENS_PER_FRAME = (FRAME_SIZE // TOKEN_SIZE) ** 2
FILE_FRAMES = 64  # of the files that demo.py writes
RECENT = 3  # frames for which an object counts as new
# Frame numbers are told apart finely at the start and by fours later; each group is a class.
FRAME_GROUPS = np.array([0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36])

# Labels and how many values each has, or None for a pair of lengths, across and down. Of patches 0 stands for the
# background; of tokens only those of objects are labelled.
PATCH_LABELS: dict[str, int | None] = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "letter": len(LETTERS) + 1}
TOKEN_LOOKS: dict[str, int | None] = {
    "color": len(COLORS), "shape": len(SHAPES), "letter": len(LETTERS) + 1, "place": None,
}  # fmt: skip
TOKEN_EVENTS: dict[str, int | None] = {
    "letter": len(LETTERS) + 1, "direction": len(DIRECTIONS) + 1, "shift": None, "age": 3, "time": len(FRAME_GROUPS),
}  # fmt: skip
LENGTH_UNIT = 10  # pixels


@dataclass(frozen=True, kw_only=True)
class LongClips:
    """pixels (clips, frames, 3, 80, 80); labels of patches (clips * frames, 100) and tokens (clips, frames * 25).

    Labels that are lengths have one more axis, of two: across and down.
    """

    pixels: torch.Tensor
    patches: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]


def sample_times(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Times of uniform frames: one anywhere in each equal part, or evenly from a file's first frame to its last."""
    if frames == 1 or rng.random() < 0.5:
        return (np.arange(frames) + rng.uniform(0.02, 0.98, frames)) / frames
    return np.round(np.linspace(0, FILE_FRAMES - 1, frames)) / FILE_FRAMES


def sample_readable(rng: np.random.Generator, frames: int, static_camera: float) -> tuple[Scene, np.ndarray]:
    """A scene and frame times between which everything that may be asked can be seen."""
    while True:
        scene = sample_scene(rng, slots=max(frames, 4), static_camera=static_camera)
        times = sample_times(rng, frames)
        if readable(scene, times.tolist()):
            return scene, times


def sample_clips(
    rng: np.random.Generator, *, clips: int, frames: int, static_camera: float
) -> tuple[LongClips, list[tuple[Scene, np.ndarray]]]:
    """Rendered, slightly degraded clips, and the scene and frame times of each."""
    scenes = [sample_readable(rng, frames, static_camera) for _ in range(clips)]
    pictures, patches, tokens = [], [], []
    for scene, times in scenes:
        picture, owner = render(scene, times)
        pictures.append(np.clip(soften(picture, rng), 0, 255))
        patches.append(patch_labels(scene, owner))
        tokens.append(token_labels(scene, times, owner))
    return LongClips(pixels=normalize(np.stack(pictures)), patches=_stack(patches), tokens=_stack(tokens)), scenes


def _stack(labels: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.concatenate([label[name] for label in labels])) for name in labels[0]}


def patch_labels(scene: Scene, owner: np.ndarray) -> dict[str, np.ndarray]:
    """Colour, shape and letter (frames, patches) of the object that covers most of a patch, 0 below a tenth of it."""
    owners = cell_owners(owner, PATCH_SIZE, len(scene.objects), least=PATCH_SIZE**2 / 10)
    return {name: np.array([0, *(value + 1 for value in values)])[owners] for name, values in _looks(scene).items()}


def _looks(scene: Scene) -> dict[str, list[int]]:
    """Colour, shape and letter of every object as numbers from 0; -1 stands for no letter."""
    return {
        "color": [list(COLORS).index(item.color) for item in scene.objects],
        "shape": [SHAPES.index(item.shape) for item in scene.objects],
        "letter": [list(LETTERS).index(item.letter) if item.letter else -1 for item in scene.objects],
    }


def token_labels(scene: Scene, times: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """What can be known of an object at each of its tokens (1, frames * tokens) from this frame and those before.

    Background has no label (IGNORE), nor has the direction of an object that is seen for the first time.
    `place` is the centre's distance from that of the frame, `shift` is how far the object has moved by itself.
    """
    # (frames, tokens) number of the object under each token, 0 for the background
    owners = cell_owners(owner, TOKEN_SIZE, len(scene.objects), least=TOKEN_SIZE**2 / 20)
    looks = _looks(scene)
    shape = len(scene.objects) + 1, len(times)  # a table for each label; row 0 is the background
    tables = {name: np.full(shape, IGNORE) for name in ("color", "shape", "letter", "direction", "age", "time")}
    tables |= {name: np.full((*shape, 2), IGNORE, np.float32) for name in ("place", "shift")}
    for index, item in enumerate(scene.objects):
        row = index + 1
        tables["color"][row], tables["shape"][row] = looks["color"][index], looks["shape"][index]
        tables["letter"][row] = looks["letter"][index] + 1
        tables["time"][row] = np.searchsorted(FRAME_GROUPS, np.arange(len(times)), side="right") - 1
        step = np.array(DIRECTIONS[item.direction]) if item.direction else np.zeros(2)
        # Numbers of the frames that show the object
        seen = np.flatnonzero([item.visible(time) for time in times])
        for number, frame in enumerate(seen):
            tables["age"][row, frame] = 0 if seen[0] == 0 else 1 if number < RECENT else 2
            if number:
                tables["direction"][row, frame] = _direction(item)
            way = item.distance * (times[frame] - times[seen[0]]) / (item.end - item.start)
            tables["shift"][row, frame] = step * way / LENGTH_UNIT
            tables["place"][row, frame] = (np.array(item.center(times[frame])) - FRAME_SIZE / 2) / LENGTH_UNIT
    frames = np.arange(len(times))[:, None]
    # (frames, tokens): each token looks up its owner's label in its frame
    tokens = {name: table[owners, frames] for name, table in tables.items()}
    return {name: value.reshape(1, -1, *value.shape[2:]) for name, value in tokens.items()}


def _direction(item: SceneObject) -> int:
    return list(DIRECTIONS).index(item.direction) + 1 if item.direction else 0


def sample_text(
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[tuple[Scene, np.ndarray]],
    *,
    questions: int,
    captions: int,
    emphasis: Mapping[str, float],
) -> TextRow:
    """Questions and captions for every clip, weighted as in `pack`; `emphasis` as for `choose_questions`."""
    rows = []
    for scene, times in scenes:
        pool = [question for _ in range(2) for question in ask(scene, times.tolist(), rng)]
        chosen = choose_questions(pool, rng, questions, emphasis)
        forms = rng.permutation(list(CAPTIONS)[: 2 if len(times) == 1 else None])[:captions]
        rows.append(
            [make_segment(tokenizer, *caption(scene, times.tolist(), str(form)), CAPTION_KIND) for form in forms]
            + [make_segment(tokenizer, q.text, q.answer, KINDS.index(q.kind)) for q in chosen]
        )
    video = len(scenes[0][1]) * TOKENS_PER_FRAME + 1  # tokens of the video and its newline
    return pack(rows, tokenizer, first_position=video + 2)
