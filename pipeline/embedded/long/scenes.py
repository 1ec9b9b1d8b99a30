"""Synthetic scenes for 32 frames: small and large shapes, a lettered card, pans, cuts, short flashes, sensor noise.

Time runs over [0, 1). Lengths are in pixels of an 80 x 80 frame, whatever size is rendered. The camera sees the world
shifted by `pan * time`; in a scene with cuts every object belongs to one shot. Everything is drawn with numpy from
seeds, so a scene renders to the same pixels everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.embedded.scenes import COLORS, DIRECTIONS, POSITIONS, Box, background, collide, signed_distance
from pipeline.embedded.scenes import SHAPES as PLAIN_SHAPES

FRAME_SIZE = 80
CARD = "card"  # a square that bears a letter
SHAPES = (*PLAIN_SHAPES, CARD)
# Letters of 5 x 5 cells; none is a part of another, so each needs to be read as a whole.
LETTERS = {
    "t": ("#####", "..#..", "..#..", "..#..", "..#.."),
    "l": ("#....", "#....", "#....", "#....", "#####"),
    "x": ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
    "o": ("#####", "#...#", "#...#", "#...#", "#####"),
    "h": ("#...#", "#...#", "#####", "#...#", "#...#"),
    "z": ("#####", "...#.", "..#..", ".#...", "#####"),
}
BITMAPS = {letter: np.array([[cell == "#" for cell in row] for row in rows]) for letter, rows in LETTERS.items()}
LETTER_WIDTH = 1.3  # of a card's radius
MAX_OBJECTS = 6
MARGIN = 24  # background beyond each side of the frame, more than the longest pan

Role = Literal["moving", "flash", "late", "left", "static"]
Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape, seen while start <= time < end; (x, y) is its centre in the world at `start`."""

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
    letter: str | None = None
    pan: tuple[float, float] = (0.0, 0.0)

    def visible(self, time: float) -> bool:
        return self.start <= time < self.end

    def center(self, time: float) -> tuple[float, float]:
        """The place in the frame: the object's own motion and the camera's, whose steps are whole pixels."""
        dx, dy = DIRECTIONS[self.direction] if self.direction else (0, 0)
        way = self.distance * (time - self.start) / (self.end - self.start)
        return self.x + dx * way + round(self.pan[0] * time), self.y + dy * way + round(self.pan[1] * time)

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
    """Objects of distinct colours and shapes, the times of cuts, the camera's way over the clip, sensor noise (sigma).

    `texture_seed` settles backgrounds, exact hues and noise.
    """

    objects: tuple[SceneObject, ...]
    texture_seed: int
    cuts: tuple[float, ...] = ()
    pan: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.0

    @property
    def camera(self) -> str:
        """`static`, `pan` or `cuts`."""
        return "cuts" if self.cuts else "pan" if any(self.pan) else "static"

    def visible_at(self, time: float) -> list[SceneObject]:
        return [item for item in self.objects if item.visible(time)]

    def shots(self) -> list[Span]:
        return list(zip((0.0, *self.cuts), (*self.cuts, 1.0), strict=True))


def sample_scene(rng: np.random.Generator, *, slots: int = 32, static_camera: float = 1 / 3) -> Scene:
    """A random scene; a flash lasts 1 to 3 of `slots` equal parts of the clip, so `slots` uniform frames show it.

    The camera is static with probability `static_camera`; pans and cuts share the rest.
    """
    pan, cuts = _sample_camera(rng, static_camera)
    scene = Scene(objects=(), texture_seed=int(rng.integers(2**31)), cuts=cuts, pan=pan, noise=float(rng.uniform(0, 7)))
    # Each object gets a role and the shot that it belongs to before it gets a place.
    plan = _sample_roles(rng, scene)
    colors = [str(color) for color in rng.permutation(list(COLORS))]
    shapes = [str(shape) for shape in rng.permutation(PLAIN_SHAPES)]
    lasting = [index for index, (role, _) in enumerate(plan) if role != "flash"]
    if rng.random() < 0.7:  # one of the lasting objects is a card
        shapes.insert(int(rng.choice(lasting)), CARD)
    objects: list[SceneObject] = []
    # An object without a free place is left out.
    for (role, span), color, shape in zip(plan, colors, shapes, strict=False):
        placed = _place(rng, role, color, shape, span, scene, slots, objects)
        objects += [placed] if placed else []
    return Scene(objects=tuple(objects), texture_seed=scene.texture_seed, cuts=cuts, pan=pan, noise=scene.noise)


def _sample_camera(rng: np.random.Generator, static_camera: float) -> tuple[tuple[float, float], tuple[float, ...]]:
    """The pan over the whole clip and the times of the cuts, of which at least one is none."""
    # The two moving cameras share what a static one leaves.
    moved = (1 - static_camera) / 2
    camera = rng.choice(["static", "pan", "cuts"], p=[static_camera, moved, moved])
    if camera == "pan":
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(8, 20)
        return (float(np.cos(angle) * length), float(np.sin(angle) * length)), ()
    if camera == "cuts":
        # One cut near the middle or two apart, so that every shot has many frames.
        one = rng.random() < 0.5
        times = [rng.uniform(0.35, 0.65)] if one else [rng.uniform(0.25, 0.4), rng.uniform(0.6, 0.75)]
        return (0.0, 0.0), tuple(float(time) for time in times)
    return (0.0, 0.0), ()


def _sample_roles(rng: np.random.Generator, scene: Scene) -> list[tuple[Role, Span]]:
    """At most MAX_OBJECTS roles with the shot of each; late and left objects only where no cut could explain them."""
    shots = scene.shots()
    plan: list[tuple[Role, Span]] = [("moving", shots[int(rng.integers(len(shots)))])] if rng.random() < 0.85 else []
    plan += [("flash", (0.0, 1.0))] if rng.random() < 0.65 else []
    if not scene.cuts:
        plan += [("late", shots[0])] if rng.random() < 0.55 else []
        plan += [("left", shots[0])] if rng.random() < 0.55 else []
    for shot in shots:
        plan += [("static", shot)] * int(rng.integers(1, 3))
    return plan[:MAX_OBJECTS]


def _place(
    rng: np.random.Generator,
    role: Role,
    color: str,
    shape: str,
    span: Span,
    scene: Scene,
    slots: int,
    others: list[SceneObject],
    tries: int = 40,
) -> SceneObject | None:
    """An object that never touches the others while both are visible, or None when no free place was found."""
    for _ in range(tries):
        candidate = _random_object(rng, role, color, shape, span, scene, slots)
        if candidate and not any(collide(candidate, other) for other in others):
            return candidate
    return None


def _random_object(
    rng: np.random.Generator, role: Role, color: str, shape: str, span: Span, scene: Scene, slots: int
) -> SceneObject | None:
    """An object that stays inside the frame for all of its time, or None when this draw does not allow it."""
    large = shape == CARD or rng.random() < 0.45
    radius = float(rng.uniform(9.5, 12.5) if large else rng.uniform(4.8, 6.5))  # about four tokens or one
    (start, end), direction, distance = span, None, 0.0
    if role == "moving":
        direction, distance = str(rng.choice(list(DIRECTIONS))), float(rng.uniform(32, 46))
    elif role == "flash":
        length = int(rng.integers(1, max(slots // 8, 1) + 1)) if slots < 24 else int(rng.integers(1, 4))
        first = int(rng.integers(0, slots - length + 1))
        start, end = first / slots, (first + length) / slots
        if any(start < cut < end for cut in scene.cuts):
            return None
    elif role == "late":
        start = float(rng.uniform(0.32, 0.72))
    elif role == "left":
        end = float(rng.uniform(0.28, 0.68))
    # Where the centre may be at `start`, so that neither motion nor camera carries the object out of the frame.
    own = np.array(DIRECTIONS[direction]) * distance if direction else np.zeros(2)
    shifts = np.stack([np.round(np.array(scene.pan) * start), own + np.round(np.array(scene.pan) * end)])
    low, high = radius + 1 - shifts.min(0), FRAME_SIZE - radius - 1 - shifts.max(0)
    if (low > high).any():
        return None
    x, y = (float(value) for value in rng.uniform(low, high))
    letter = str(rng.choice(list(LETTERS))) if shape == CARD else None
    return SceneObject(
        role=role, color=color, shape=shape, radius=radius, x=x, y=y, start=start, end=end,
        direction=direction, distance=distance, letter=letter, pan=scene.pan,
    )  # fmt: skip


def render(scene: Scene, times: np.ndarray, size: int = FRAME_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Frames (len(times), size, size, 3) as float32 in [0, 255] and the owner of each pixel (len(times), size, size).

    The owner is 0 for the background and i + 1 for `scene.objects[i]`.
    """
    rng = np.random.default_rng(scene.texture_seed)
    hues = [np.clip(np.array(COLORS[item.color]) + rng.normal(0, 8, 3), 0, 255) for item in scene.objects]
    # (T, size, size, 3) backgrounds, drawn over by the objects in their order
    frames = _render_backgrounds(rng, scene, times, size)
    owner = np.zeros(frames.shape[:3], np.int8)
    for index, item in enumerate(scene.objects):
        for frame, time in enumerate(times):
            if item.visible(time):
                _draw(frames[frame], owner[frame], index + 1, item, hues[index], time)
    # The noise differs from frame to frame, so unchanged places are not equal.
    frames += rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(scene.noise)
    return np.clip(frames, 0, 255), owner


def _render_backgrounds(rng: np.random.Generator, scene: Scene, times: np.ndarray, size: int) -> np.ndarray:
    """(len(times), size, size, 3): for every frame the window that the camera sees of its shot's background."""
    scale = size / FRAME_SIZE
    margin = int(MARGIN * scale)
    frames = np.empty((len(times), size, size, 3), np.float32)
    for start, end in scene.shots():
        world = background(rng, size + 2 * margin)
        for frame, time in enumerate(times):
            if start <= time < end:
                left, top = (margin - int(round(way * time) * scale) for way in scene.pan)
                frames[frame] = world[top : top + size, left : left + size]
    return frames


def _draw(frame: np.ndarray, owner: np.ndarray, label: int, item: SceneObject, hue: np.ndarray, time: float) -> None:
    scale = frame.shape[0] / FRAME_SIZE
    x, y = item.center(time)
    reach = item.radius + 1
    left, top = max(int((x - reach) * scale), 0), max(int((y - reach) * scale), 0)
    window = (slice(top, int((y + reach) * scale) + 1), slice(left, int((x + reach) * scale) + 1))
    rows, columns = (np.arange(size, dtype=np.float32) for size in frame[window].shape[:2])
    # Distances from the centre, in pixels of FRAME_SIZE, of the window's pixels.
    grid_x = (left + columns + 0.5) / scale - np.float32(x)
    grid_y = (top + rows + 0.5) / scale - np.float32(y)
    outline = "square" if item.shape == CARD else item.shape
    distance = signed_distance(outline, grid_x[None, :], grid_y[:, None], item.radius)
    # Edges are smooth: a pixel that the outline halves is mixed half and half.
    alpha = np.clip(0.5 - distance * scale, 0, 1)
    frame[window] += alpha[..., None] * (hue.astype(np.float32) - frame[window])
    owner[window][alpha > 0.5] = label
    if item.letter:
        # A dark letter on a light card and a light one on a dark card.
        luma = hue @ np.array([0.3, 0.59, 0.11])
        frame[window][_letter_mask(item, grid_x, grid_y)] = 15 if luma > 110 else 245


def _letter_mask(item: SceneObject, grid_x: np.ndarray, grid_y: np.ndarray) -> np.ndarray:
    """Which pixels (len(grid_y), len(grid_x)) the letter of a card covers."""
    bitmap = BITMAPS[item.letter or ""]
    cells = len(bitmap)
    width = item.radius * LETTER_WIDTH / cells
    columns, rows = (np.floor(grid / width + cells / 2).astype(int) for grid in (grid_x, grid_y))
    inside = ((rows >= 0) & (rows < cells))[:, None] & ((columns >= 0) & (columns < cells))[None, :]
    return inside & bitmap[np.clip(rows, 0, cells - 1)[:, None], np.clip(columns, 0, cells - 1)[None, :]]
