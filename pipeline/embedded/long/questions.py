"""Questions of 12 to 20 words, answers, options and captions about a long scene."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pipeline.embedded.long.scenes import FRAME_SIZE, LETTERS, SHAPES, Role, Scene, SceneObject
from pipeline.embedded.questions import Fact, SceneQuestion, answer_type, draw_options, existence_facts, words_of
from pipeline.embedded.scenes import COLORS, DIRECTIONS, POSITIONS

WORDINGS: dict[str, tuple[str, str, str]] = {
    "moving_color": (
        "Watch the whole video from the start to the end. What color is the object that moves across the background?",
        "Most of the objects stay in their place. Which color does the one that moves have?",
        "Please name the color of the object in motion, not of those that stay.",
    ),
    "moving_shape": (
        "Watch the whole video from the start to the end. What shape is the object that moves across the background?",
        "Most of the objects stay in their place. Which shape does the one that moves have?",
        "Please name the shape of the object in motion, not of those that stay.",
    ),
    "moving_direction": (
        "One of the objects moves across the background. In which direction does it go?",
        "Look at the object that moves, not at the camera. Which way is the moving object going?",
        "Please name the direction in which the object in motion is heading.",
    ),
    "flash_color": (
        "One object flashes and can be seen only for a moment. What color is it?",
        "Somewhere in the video an object is there for an instant. Please name the color of this flashing object.",
        "Which color does the object have that flashes briefly and then is gone?",
    ),
    "flash_shape": (
        "One object flashes and can be seen only for a moment. What shape is it?",
        "Somewhere in the video an object is there for an instant. Please name the shape of this flashing object.",
        "Which shape does the object have that flashes briefly and then is gone?",
    ),
    "flash_time": (
        "One object flashes and can be seen only for a moment. In which part of the video is that?",
        "When does the flashing object appear: at the start, in the middle or at the end?",
        "Please name the part of the video in which an object flashes briefly.",
    ),
    "late_color": (
        "One object is not there at the start, comes later and stays. What color is it?",
        "Please name the color of the object that appears later in the video and then stays to the end.",
        "Which color does the object have that was missing at the start but is there at the end?",
    ),
    "late_shape": (
        "One object is not there at the start, comes later and stays. What shape is it?",
        "Please name the shape of the object that appears later in the video and then stays to the end.",
        "Which shape does the object have that was missing at the start but is there at the end?",
    ),
    "left_color": (
        "One object is there at the start and leaves before the end. What color is it?",
        "Please name the color of the object that is gone long before the video ends.",
        "Which color does the object have that was there at the start but is missing at the end?",
    ),
    "left_shape": (
        "One object is there at the start and leaves before the end. What shape is it?",
        "Please name the shape of the object that is gone long before the video ends.",
        "Which shape does the object have that was there at the start but is missing at the end?",
    ),
    "order_color": (
        "Which of these two can be seen first in the video, the {first} object or the {second} object?",
        "Two objects come one after the other: the {first} one and the {second} one. Which color comes first?",
        "Please name the color that is seen first in the video, {first} or {second}.",
    ),
    "count": (
        "How many objects can be seen at the {when} of the video, large and small?",
        "Please count all of the objects that are there at the {when} of the video.",
        "Look only at the {when} of the video. How many objects does the frame show?",
    ),
    "position": (
        "In which corner of the frame is the {color} object at the {when} of the video?",
        "Look only at the {when} of the video. Where is the {color} object then?",
        "Please name the part of the frame that holds the {color} object at the {when}.",
    ),
    "letter": (
        "One of the objects is a card with a letter on it. Which letter is it?",
        "Please read the letter on the card that can be seen in the video.",
        "Which letter is written on the {color} card that the video shows?",
    ),
    "shape_of_color": (
        "Somewhere in the video there is an object that is {color}. What shape is it?",
        "Which shape does the {color} object have that can be seen in the video?",
        "Please name the shape of the object that is {color}, not of the others.",
    ),
    "color_of_shape": (
        "Somewhere in the video there is an object that is a {shape}. What color is it?",
        "Which color does the {shape} have that can be seen in the video?",
        "Please name the color of the {shape}, not of the other objects.",
    ),
    "existence": (
        "Is there any {color} object in the video, at the start, in the middle or at the end?",
        "Does the video show any {color} object, large or small, at any moment?",
        "Can any {color} object be seen somewhere in the video, if only for a moment?",
    ),
}
KINDS = tuple(WORDINGS)
BAG_KINDS = ("shape_of_color", "color_of_shape", "existence")  # any frame, or any few tokens, hold the answer

CAPTIONS: dict[str, str] = {
    "color": "Please list all of the objects in the video by color.",
    "shape": "Please list all of the objects in the video by shape.",
    "event_color": "Please list all of the events in the video by color.",
    "event_shape": "Please list all of the events in the video by shape.",
}
EVENTS: dict[Role, str] = {
    "moving": "moves", "flash": "flashes", "late": "appears", "left": "leaves", "static": "stays",
}  # fmt: skip
# Parts of the clip; a moment between two parts has no name, so that no question turns on a hair.
PARTS = {"start": (0.0, 0.3), "middle": (0.37, 0.63), "end": (0.7, 1.0)}

ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "time": tuple(PARTS),
    "count": ("1", "2", "3", "4", "5", "6"),
    "position": POSITIONS,
    "letter": tuple(LETTERS),
    "existence": ("yes", "no"),
}
CENTRE_MARGIN = 5  # pixels between an object's centre and the frame's middle lines where its corner is asked
ORDER_GAP = 0.15  # of the clip, between the first frames of two objects whose order is asked


def vocabulary() -> list[str]:
    """Every word and punctuation mark of questions, answers and captions, sorted."""
    texts = [text for wordings in WORDINGS.values() for text in wordings]
    texts += [*CAPTIONS.values(), *EVENTS.values()] + [text for values in ANSWERS.values() for text in values]
    return words_of(texts)


def readable(scene: Scene, times: Sequence[float]) -> bool:
    """Whether frames at `times` show a lasting object and, if there are several, tell every event from the others.

    A flash has to be seen in fewer frames than anything else, and everything else in two frames at least: else nobody
    could tell a flash from a short shot, motion from rest, or an object that comes late from one that flashes.
    """
    frames = _frames_seen(scene, times)
    lasting = [frames[item.color] for item in scene.objects if item.role != "flash" and frames[item.color]]
    if len(times) == 1:
        return bool(lasting)
    flashes = [frames[item.color] for item in scene.objects if item.role == "flash"]
    return bool(lasting) and min(lasting) > max([1, *flashes])


def ask(scene: Scene, times: Sequence[float], rng: np.random.Generator) -> Iterator[SceneQuestion]:
    """One question of every kind that has one clear answer in frames taken at `times`, in the order of KINDS."""
    for kind in KINDS:
        facts = _FACTS[kind](scene, times)
        if facts:
            fill, answer = facts[int(rng.integers(len(facts)))]
            wording = WORDINGS[kind][int(rng.integers(len(WORDINGS[kind])))]
            yield SceneQuestion(
                kind=kind, text=wording.format(**fill), answer=answer, options=_options(kind, fill, answer, scene, rng)
            )


def _options(kind: str, fill: dict[str, str], answer: str, scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    if kind == "order_color":
        return fill["first"], fill["second"]
    shown = {item.color for item in scene.objects} | {item.shape for item in scene.objects}
    return draw_options(ANSWERS[answer_type(kind)], answer, shown, rng)


def _frames_seen(scene: Scene, times: Sequence[float]) -> dict[str, int]:
    """In how many of the frames each object is seen, by its colour."""
    return {item.color: sum(item.visible(time) for time in times) for item in scene.objects}


def _seen(scene: Scene, times: Sequence[float]) -> list[SceneObject]:
    return [item for item in scene.objects if any(item.visible(time) for time in times)]


def _lasting(scene: Scene, times: Sequence[float]) -> list[SceneObject]:
    return [item for item in _seen(scene, times) if item.role != "flash"]


def _role_fact(role: Role, attribute: str) -> Callable[[Scene, Sequence[float]], list[Fact]]:
    """Facts on the only object of a role; a late one must be missing at first, one that left at last."""

    def facts(scene: Scene, times: Sequence[float]) -> list[Fact]:
        items = [item for item in _seen(scene, times) if item.role == role]
        wrong_end = {"late": times[0], "left": times[-1]}.get(role)
        if len(times) == 1 or any(wrong_end is not None and item.visible(wrong_end) for item in items):
            return []
        return [({}, getattr(item, attribute)) for item in items]

    return facts


def part_of_clip(time: float) -> str | None:
    """`start`, `middle` or `end`, or None between two of them."""
    return next((name for name, (first, last) in PARTS.items() if first <= time <= last), None)


def _flash_time(scene: Scene, times: Sequence[float]) -> list[Fact]:
    flashes = [item for item in _seen(scene, times) if item.role == "flash" and len(times) > 1]
    parts = [part_of_clip((item.start + item.end) / 2) for item in flashes]
    return [({}, part) for part in parts if part]


def _order_color(scene: Scene, times: Sequence[float]) -> list[Fact]:
    """Pairs of colours, in both orders, of which one is seen clearly before the other."""
    # Number of the first frame that shows each object, by its colour.
    onset = {
        item.color: next(frame for frame, time in enumerate(times) if item.visible(time))
        for item in _seen(scene, times)
    }
    gap = max(1, ORDER_GAP * len(times))
    return [
        ({"first": a, "second": b}, a if onset[a] < onset[b] else b)
        for a in onset
        for b in onset
        if abs(onset[a] - onset[b]) >= gap
    ]


def _ends(times: Sequence[float]) -> dict[str, float]:
    return {"end": times[-1]} if len(times) == 1 else {"start": times[0], "end": times[-1]}


def _count(scene: Scene, times: Sequence[float]) -> list[Fact]:
    """How many objects the first or the last frame shows, where it shows some and none that only flashes."""
    shown = {when: scene.visible_at(time) for when, time in _ends(times).items()}
    return [
        ({"when": when}, str(len(items)))
        for when, items in shown.items()
        if items and all(item.role != "flash" for item in items)
    ]


def _position(scene: Scene, times: Sequence[float]) -> list[Fact]:
    """Corners, in the first or the last frame, of objects whose centre is clearly in one."""
    return [
        ({"color": item.color, "when": when}, item.position(time))
        for when, time in _ends(times).items()
        for item in _lasting(scene, times)
        if item.visible(time) and clearly_in_corner(item, time)
    ]


def clearly_in_corner(item: SceneObject, time: float) -> bool:
    """Whether the centre keeps away from the frame's middle lines."""
    return min(abs(place - FRAME_SIZE / 2) for place in item.center(time)) > CENTRE_MARGIN


def _letter(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return [({"color": item.color}, item.letter) for item in _lasting(scene, times) if item.letter]


def _shape_of_color(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return [({"color": item.color}, item.shape) for item in _lasting(scene, times)]


def _color_of_shape(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return [({"shape": item.shape}, item.color) for item in _lasting(scene, times)]


def _existence(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return existence_facts([item.color for item in _seen(scene, times)], {item.color for item in scene.objects})


_FACTS: dict[str, Callable[[Scene, Sequence[float]], list[Fact]]] = {
    "moving_color": _role_fact("moving", "color"),
    "moving_shape": _role_fact("moving", "shape"),
    "moving_direction": _role_fact("moving", "direction"),
    "flash_color": _role_fact("flash", "color"),
    "flash_shape": _role_fact("flash", "shape"),
    "flash_time": _flash_time,
    "late_color": _role_fact("late", "color"),
    "late_shape": _role_fact("late", "shape"),
    "left_color": _role_fact("left", "color"),
    "left_shape": _role_fact("left", "shape"),
    "order_color": _order_color,
    "count": _count,
    "position": _position,
    "letter": _letter,
    "shape_of_color": _shape_of_color,
    "color_of_shape": _color_of_shape,
    "existence": _existence,
}


def caption(scene: Scene, times: Sequence[float], form: str) -> tuple[str, str]:
    """A request from CAPTIONS and its answer, which names every object seen at `times`."""
    first = form.removeprefix("event_")
    # In the order of the vocabulary, so that a scene has one right caption; stable within events.
    items = sorted(_seen(scene, times), key=lambda item: ANSWERS[first].index(getattr(item, first)))
    if form != first:
        items.sort(key=lambda item: list(EVENTS).index(item.role))
    phrases = []
    for item in items:
        name = [item.color, item.shape] if first == "color" else [item.shape, item.color]
        name += [item.letter] if item.letter else []
        # A single frame shows no events.
        event = [EVENTS[item.role]] if len(times) > 1 else []
        words = [*name, *event] if form == first else [*event, *name]
        phrases.append(" ".join([*words, *_manner(item, times)]))
    return CAPTIONS[form], " ".join(phrases)


def _manner(item: SceneObject, times: Sequence[float]) -> list[str]:
    """Where the object moves to, else where it was last seen, and when its event was, if that has a name."""
    if len(times) == 1:
        return [item.position(times[0])]
    last = max(time for time in times if item.visible(time))
    moments = {"flash": (item.start + item.end) / 2, "late": item.start, "left": item.end}
    part = part_of_clip(moments[item.role]) if item.role in moments else None
    return [item.direction or item.position(last), *([part] if part else [])]
