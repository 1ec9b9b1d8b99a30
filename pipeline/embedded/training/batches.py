"""Training batches: clips as pixels, and their questions and captions packed into one row of text per clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pipeline.embedded.questions import CAPTIONS, KINDS, SceneQuestion, ask, caption
from pipeline.embedded.scenes import COLORS, SHAPES, Scene, degrade, render, sample_scene
from pipeline.embedded.training.architecture import PATCH_SIZE
from pipeline.embedded.training.tokenizer import TURN_END, TURN_START

IGNORE = -100
END_WEIGHT = 0.1  # of the end-of-turn token, which is easy, against a word of the answer
CAPTION_KIND = -1


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One question or caption request with its answer; `targets[i]` is what should follow `ids[i]`."""

    ids: list[int]
    targets: list[int]
    weights: list[float]
    kind: int


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """Packed text of a batch, each (batch, length).

    `segments` counts from 1 within a row (0 stands for the video part, -1 for padding) and `positions` restart with
    each segment: a segment sees the video and itself alone, as if it were the only one.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    kinds: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Clips:
    """pixels (clips, frames, 3, 96, 96); colour and shape of every patch (clips * frames, 144), 0 = background."""

    pixels: torch.Tensor
    patch_colors: torch.Tensor
    patch_shapes: torch.Tensor


def normalize(frames: np.ndarray) -> torch.Tensor:
    """Frames (..., H, W, 3) in [0, 255] to the model's pixel values (..., 3, H, W)."""
    # float64 until the end, and channels before height and width
    scaled = (frames / 255 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(scaled, -1, -3), dtype=np.float32))


def sample_times(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Times of uniform frames: one anywhere in each equal part, or evenly from the first frame to the last."""
    if frames == 1:
        return rng.uniform(0.8, 1.0, 1)
    # As the files of the demo are sampled: frame numbers of 32, ends included.
    if rng.random() < 0.5:
        return np.round(np.linspace(0, 31, frames)) / 32
    return (np.arange(frames) + rng.uniform(0.02, 0.98)) / frames


def sample_clips(
    rng: np.random.Generator, *, clips: int, frames: int, max_static: int
) -> tuple[Clips, list[tuple[Scene, np.ndarray]]]:
    """Rendered, slightly degraded clips, and the scene and frame times of each."""
    scenes, pictures, colors, shapes = [], [], [], []
    for _ in range(clips):
        # With as many slots as frames, a flash is seen in one of them.
        scene = sample_scene(rng, slots=max(frames, 4), max_static=max_static)
        times = sample_times(rng, frames)
        picture, owner = render(scene, times)
        patch_colors, patch_shapes = patch_labels(scene, owner)
        scenes.append((scene, times))
        pictures.append(degrade(picture, rng))
        colors.append(patch_colors)
        shapes.append(patch_shapes)
    # (clips * frames, patches) each
    labels = [torch.from_numpy(np.concatenate(x)) for x in (colors, shapes)]
    return Clips(pixels=normalize(np.stack(pictures)), patch_colors=labels[0], patch_shapes=labels[1]), scenes


def patch_labels(scene: Scene, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour and shape (frames, patches) of the object that covers most of a patch, 0 below a tenth of it."""
    owners = cell_owners(owner, PATCH_SIZE, len(scene.objects), least=PATCH_SIZE**2 / 10)
    colors = np.array([0, *(list(COLORS).index(item.color) + 1 for item in scene.objects)])
    shapes = np.array([0, *(SHAPES.index(item.shape) + 1 for item in scene.objects)])
    return colors[owners], shapes[owners]


def cell_owners(owner: np.ndarray, cell: int, objects: int, least: float) -> np.ndarray:
    """Pixels' owners (frames, H, W) to those of square cells (frames, cells), row by row.

    A cell belongs to the object that covers most of it, and to nobody (0) where that is less than `least` pixels.
    """
    # The pixels of each cell on the last axis, cells in raster order.
    frames, rows, columns = (side // (cell if axis else 1) for axis, side in enumerate(owner.shape))
    cells = (
        owner.reshape(frames, rows, cell, columns, cell).transpose(0, 1, 3, 2, 4).reshape(frames, rows * columns, -1)
    )
    # (frames, cells, objects) pixels of each object
    covered = np.stack([(cells == index + 1).sum(-1) for index in range(objects)], axis=-1)
    return np.where(covered.max(-1) >= least, covered.argmax(-1) + 1, 0)


def sample_text(
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[tuple[Scene, np.ndarray]],
    *,
    questions: int,
    captions: int,
    video_tokens: int,
    emphasis: Mapping[str, float],
) -> TextRow:
    """Questions and captions for every clip; each of the two groups' weights sum to 1.

    A kind is asked in proportion to its `emphasis`, which is 1 where none is given.
    """
    rows = []
    for scene, times in scenes:
        # Two wordings of each kind, drawn by emphasis; a single frame has no events to list.
        pool = [question for _ in range(2) for question in ask(scene, times.tolist(), rng)]
        chosen = choose_questions(pool, rng, questions, emphasis)
        forms = rng.permutation(list(CAPTIONS)[: 2 if len(times) == 1 else None])[:captions]
        rows.append(
            [make_segment(tokenizer, *caption(scene, times.tolist(), str(form)), CAPTION_KIND) for form in forms]
            + [make_segment(tokenizer, q.text, q.answer, KINDS.index(q.kind)) for q in chosen]
        )
    return pack(rows, tokenizer, first_position=video_tokens + 2)


def choose_questions(
    pool: Sequence[SceneQuestion], rng: np.random.Generator, count: int, emphasis: Mapping[str, float]
) -> list[SceneQuestion]:
    """At most `count` questions of a pool, each as likely as the `emphasis` on its kind says, which is 1 by default."""
    weights = np.array([emphasis.get(question.kind, 1.0) for question in pool])
    chosen = rng.choice(len(pool), min(count, len(pool)), replace=False, p=weights / weights.sum())
    return [pool[i] for i in chosen]


@lru_cache(maxsize=65536)
def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_prefix(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Ids (1, 2) of the user's turn before the video."""
    return torch.tensor([_encode(tokenizer, f"{TURN_START}user")])


def make_segment(tokenizer: PreTrainedTokenizerFast, request: str, answer: str, kind: int) -> Segment:
    """The rest of the user's turn after the video, and the assistant's turn."""
    prompt = _encode(tokenizer, f"{request}{TURN_END}{TURN_START}assistant")
    reply = _encode(tokenizer, f"{answer}{TURN_END}")
    ids = [*prompt, *reply]
    return Segment(
        ids=ids,
        # A target stands one place before its token: the prompt's last token predicts the reply's first.
        targets=[IGNORE] * (len(prompt) - 1) + reply + [IGNORE],
        weights=[0.0] * (len(prompt) - 1) + [1.0] * (len(reply) - 1) + [END_WEIGHT, 0.0],
        kind=kind,
    )


def pack(rows: list[list[Segment]], tokenizer: PreTrainedTokenizerFast, first_position: int) -> TextRow:
    """Segments side by side, padded to the longest row."""
    shape = len(rows), max(sum(len(segment.ids) for segment in row) for row in rows)
    # (clips, length) all; padding has segment -1, weight 0 and no target
    ids = np.full(shape, tokenizer.pad_token_id, np.int64)
    targets, kinds = np.full(shape, IGNORE, np.int64), np.full(shape, CAPTION_KIND, np.int64)
    segments, positions = np.full(shape, -1, np.int64), np.full(shape, first_position, np.int64)
    weights = np.zeros(shape, np.float32)
    for row, items in enumerate(rows):
        start = 0
        for number, segment in enumerate(items, start=1):
            # Segments follow each other, but their positions all begin right after the video.
            cells = row, slice(start, start + len(segment.ids))
            ids[cells], targets[cells], weights[cells] = segment.ids, segment.targets, segment.weights
            kinds[cells], segments[cells] = segment.kind, number
            positions[cells] = first_position + np.arange(len(segment.ids))
            start += len(segment.ids)
    # Captions are longer than answers; each group weighs 1 in sum, whatever its tokens.
    for group in (kinds == CAPTION_KIND, kinds != CAPTION_KIND):
        weights[group] /= max(weights[group].sum(), 1e-9)
    tensors = (torch.from_numpy(x) for x in (ids, targets, weights, kinds, segments, positions))
    return TextRow(**dict(zip(("ids", "targets", "weights", "kinds", "segments", "positions"), tensors, strict=True)))
