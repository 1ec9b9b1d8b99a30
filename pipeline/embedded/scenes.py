"""Synthetic scenes: coloured shapes on a textured background, some of them moving, flashing or arriving late.

Time runs over [0, 1): frame i of n shows the scene at time i / n. Lengths are in pixels of a 96 x 96 frame, whatever
size is rendered. Everything is drawn with numpy from seeds, so a scene renders to the same pixels everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

FRAME_SIZE = 96
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 45),
    "green": (40, 175, 60),
    "blue": (45, 75, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 45, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "cyan": (60, 220, 230),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")

Role = Literal["moving", "flash", "late", "static"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape, seen while start <= time < end; (x, y) is its centre at time 0."""

    role: Role
    color: str
    shape: str
    radius: float
    x: float
    y: float
    start: float = 0.0
    end: float = 1.0
    direction: str | None = None
    distance: float = 0.0

    def visible(self, time: float) -> bool:
        return self.start <= time < self.end

    def center(self, time: float) -> tuple[float, float]:
        dx, dy = DIRECTIONS[self.direction] if self.direction else (0, 0)
        return self.x + dx * self.distance * time, self.y + dy * self.distance * time

    def swept_box(self, start: float, end: float) -> Box:
        """The rectangle (left, top, right, bottom) that the object covers between two times."""
        (x0, y0), (x1, y1) = self.center(start), self.center(end)
        reach = self.radius + 1
        return min(x0, x1) - reach, min(y0, y1) - reach, max(x0, x1) + reach, max(y0, y1) + reach

    def position(self, time: float) -> str:
        """The quadrant of the frame in which the centre lies, one of POSITIONS."""
        x, y = self.center(time)
        return POSITIONS[2 * int(y > FRAME_SIZE / 2) + int(x > FRAME_SIZE / 2)]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects of distinct colours and distinct shapes; `texture_seed` settles background and exact hues."""

    objects: tuple[SceneObject, ...]
    texture_seed: int

    def visible_at(self, time: float) -> list[SceneObject]:
        return [item for item in self.objects if item.visible(time)]


def sample_scene(rng: np.random.Generator, *, slots: int = 8, max_static: int = 3) -> Scene:
    """A random scene; a flash lasts one of `slots` equal parts of the clip: one of `slots` uniform frames shows it."""
    roles: list[Role] = ["moving"]
    roles += ["flash"] if rng.random() < 0.7 else []
    roles += ["late"] if rng.random() < 0.55 else []
    roles += ["static"] * int(rng.integers(1, max_static + 1))
    colors, shapes = rng.permutation(list(COLORS)), rng.permutation(SHAPES)
    objects: list[SceneObject] = []
    for role, color, shape in zip(roles, colors, shapes, strict=False):
        placed = _place(rng, role, str(color), str(shape), objects, slots)
        objects += [placed] if placed else []
    return Scene(objects=tuple(objects), texture_seed=int(rng.integers(2**31)))


def _place(
    rng: np.random.Generator, role: Role, color: str, shape: str, others: list[SceneObject], slots: int, tries: int = 40
) -> SceneObject | None:
    """An object that never touches the others while both are visible, or None when no free place was found."""
    for _ in range(tries):
        candidate = _random_object(rng, role, color, shape, slots)
        if not any(collide(candidate, other) for other in others):
            return candidate
    return None


def _random_object(rng: np.random.Generator, role: Role, color: str, shape: str, slots: int) -> SceneObject:
    radius = rng.uniform(9, 12.5)
    # (2,) where the centre may be at time 0, so that the whole shape stays in the frame
    low, high = np.full(2, radius + 1), np.full(2, FRAME_SIZE - radius - 1)
    start, end, direction, distance = 0.0, 1.0, None, 0.0
    if role == "moving":
        direction, distance = str(rng.choice(list(DIRECTIONS))), rng.uniform(36, 56)
        # The way of the motion is taken off on the side it leads to.
        step = np.array(DIRECTIONS[direction]) * distance
        low, high = low + np.maximum(-step, 0), high - np.maximum(step, 0)
    elif role == "flash":
        # Neither in the first nor in the last slot, so that it is seen to come and to go.
        slot = int(rng.integers(1, slots - 1))
        start, end = slot / slots, (slot + 1) / slots
    elif role == "late":
        # Between 3/8 and 3/4 of the clip: missing at the start, and then there for long.
        start = int(rng.integers(slots * 3 // 8 + 1, slots * 3 // 4)) / slots
    x, y = rng.uniform(low, high)
    return SceneObject(
        role=role, color=color, shape=shape, radius=radius, x=float(x), y=float(y),
        start=start, end=end, direction=direction, distance=distance,
    )  # fmt: skip


class Swept(Protocol):
    """An object that is visible for a while and sweeps over a part of the picture."""

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    def swept_box(self, start: float, end: float) -> Box: ...


def collide(first: Swept, second: Swept) -> bool:
    """Whether the ways of two objects cross while both are visible."""
    start, end = max(first.start, second.start), min(first.end, second.end)
    if start >= end:
        return False
    # The boxes of both whole ways while both are visible, which is stricter than at each moment.
    a, b = first.swept_box(start, end), second.swept_box(start, end)
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def render(scene: Scene, times: np.ndarray, size: int = FRAME_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Frames (len(times), size, size, 3) as float32 in [0, 255] and the owner of each pixel (len(times), size, size).

    The owner is 0 for the background and i + 1 for `scene.objects[i]`.
    """
    rng = np.random.default_rng(scene.texture_seed)
    hues = [np.clip(np.array(COLORS[item.color]) + rng.normal(0, 8, 3), 0, 255) for item in scene.objects]
    frames = np.repeat(background(rng, size)[None], len(times), axis=0)
    owner = np.zeros(frames.shape[:3], np.int8)
    for index, item in enumerate(scene.objects):
        for frame, time in enumerate(times):
            if item.visible(time):
                _draw(frames[frame], owner[frame], index + 1, item, hues[index], time)
    return frames, owner


def _draw(frame: np.ndarray, owner: np.ndarray, label: int, item: SceneObject, hue: np.ndarray, time: float) -> None:
    # Rendered pixels for each pixel of the 96 x 96 frame; only the object's window is computed.
    scale = frame.shape[0] / FRAME_SIZE
    x, y = item.center(time)
    reach = item.radius + 1
    left, top = int((x - reach) * scale), int((y - reach) * scale)
    right, bottom = int((x + reach) * scale) + 1, int((y + reach) * scale) + 1
    # Distances of pixel centres from the shape's centre, in pixels of the 96 x 96 frame
    grid_x = (np.arange(left, right, dtype=np.float32) + 0.5) / scale - np.float32(x)
    grid_y = (np.arange(top, bottom, dtype=np.float32) + 0.5) / scale - np.float32(y)
    distance = signed_distance(item.shape, grid_x[None, :], grid_y[:, None], item.radius)
    # Edges are smooth: a pixel that the outline halves is mixed half and half.
    alpha = np.clip(0.5 - distance * scale, 0, 1)
    window = frame[top:bottom, left:right]
    window += alpha[..., None] * (hue.astype(np.float32) - window)
    owner[top:bottom, left:right][alpha > 0.5] = label


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline of a shape around the origin, negative inside."""
    across, along = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(across, along) - 0.88 * radius
    if shape == "triangle":
        return np.maximum(y - 0.75 * radius, 0.866 * across - 0.5 * (y + radius))
    if shape == "cross":
        return np.minimum(
            np.maximum(across - radius, along - 0.3 * radius), np.maximum(along - radius, across - 0.3 * radius)
        )
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    if shape == "bar":
        return np.maximum(across - radius, along - 0.42 * radius)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A muted texture (size, size, 3): smooth colour, finer grain and a few rectangles."""
    coarse = rng.normal(0, 1, (5, 5, 3)).astype(np.float32)
    # Mostly grey: the colour channels vary together, and only a little each by itself.
    coarse = 1.5 * coarse.mean(-1, keepdims=True) + 0.6 * coarse
    grain = rng.normal(0, 1, (24, 24, 1)).astype(np.float32)
    picture = (
        rng.uniform(50, 150) + _stretch(coarse, size) * rng.uniform(8, 26) + _stretch(grain, size) * rng.uniform(3, 12)
    )
    for _ in range(int(rng.integers(1, 6))):
        left, top = rng.uniform(0, 0.9, 2)
        width, height = rng.uniform(0.03, 0.38, 2)
        tint = (rng.uniform(-28, 28) + rng.uniform(-8, 8, 3)).astype(np.float32)
        # Rectangles may reach beyond the frame, where the slice cuts them.
        rows, columns = (slice(int(a * size), int((a + b) * size)) for a, b in ((top, height), (left, width)))
        picture[rows, columns] += tint
    return np.clip(picture, 15, 190).astype(np.float32)


def _stretch(picture: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of a small (n, n, channels) picture to (size, size, channels)."""
    weights = _stretch_weights(picture.shape[0], size)
    # (size, n, channels), then the columns alike
    rows = np.tensordot(weights, picture, axes=(1, 0))
    return np.tensordot(weights, rows, axes=(1, 1)).transpose(1, 0, 2)


@lru_cache
def _stretch_weights(source: int, size: int) -> np.ndarray:
    # (size, n): each pixel is a mix of the two source values nearest to it
    place = (np.arange(size) + 0.5) / size * (source - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(source)[None, :]), 0).astype(np.float32)


def degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (T, H, W, 3) as after a codec and a resize: some blurred colour, soft or sharp edges, noise."""
    frames = soften(frames, rng)
    if rng.random() < 0.7:
        frames = frames + rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(rng.uniform(0, 5))
    return np.clip(frames, 0, 255)


def soften(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (T, H, W, 3) with halved chroma and soft or sharp edges, each at random; values may leave [0, 255]."""
    if rng.random() < 0.6:
        # Codecs store colour at half the resolution: the chroma of 2x2 pixels becomes their mean.
        luma = frames.mean(-1, keepdims=True)
        chroma = frames - luma
        halved = (chroma[:, ::2, ::2] + chroma[:, 1::2, ::2] + chroma[:, ::2, 1::2] + chroma[:, 1::2, 1::2]) / 4
        frames = luma + halved.repeat(2, axis=1).repeat(2, axis=2)
    if rng.random() < 0.7:
        # Above 0 blurs, below 0 sharpens, along rows and then columns.
        amount = np.float32(rng.uniform(-0.08, 0.2))
        for axis in (1, 2):
            padded = np.concatenate([frames.take([0], axis), frames, frames.take([-1], axis)], axis)
            before, after = (padded.take(range(o, o + frames.shape[axis]), axis) for o in (0, 2))
            frames = frames + amount * (before + after - 2 * frames)
    return frames
