"""Questions, answers, options and captions about a synthetic scene, and the words that they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.embedded.scenes import COLORS, DIRECTIONS, POSITIONS, SHAPES, Role, Scene, SceneObject

WORDINGS: dict[str, tuple[str, str, str]] = {
    "moving_color": (
        "What color is the moving object?",
        "Which color does the object that moves have?",
        "Name the color of the object in motion.",
    ),
    "moving_shape": (
        "What shape is the moving object?",
        "Which shape does the object that moves have?",
        "Name the shape of the object in motion.",
    ),
    "moving_direction": (
        "In which direction does the object move?",
        "Which way is the moving object going?",
        "Where is the object in motion heading?",
    ),
    "flash_color": (
        "What color is the object that flashes briefly?",
        "One object is visible only for a moment. Which color is it?",
        "Name the color of the flashing object.",
    ),
    "flash_shape": (
        "What shape is the object that flashes briefly?",
        "One object is visible only for a moment. Which shape is it?",
        "Name the shape of the flashing object.",
    ),
    "late_color": (
        "What color is the object that appears later?",
        "One object comes later and stays. Which color is it?",
        "Name the color of the object that was not there at the start.",
    ),
    "late_shape": (
        "What shape is the object that appears later?",
        "One object comes later and stays. Which shape is it?",
        "Name the shape of the object that was not there at the start.",
    ),
    "count": (
        "How many objects are there at the end?",
        "How many objects does the last frame show?",
        "Count the objects at the end of the video.",
    ),
    "shape_of_color": (
        "What shape is the {color} object?",
        "Which shape does the {color} object have?",
        "Name the shape of the object that is {color}.",
    ),
    "color_of_shape": (
        "What color is the {shape}?",
        "Which color does the {shape} have?",
        "Name the color of the {shape}.",
    ),
    "position": (
        "Where is the {color} object?",
        "In which corner is the {color} object?",
        "Which part of the frame holds the {color} object?",
    ),
    "existence": (
        "Is there a {color} object?",
        "Does the video show a {color} object?",
        "Can a {color} object be seen?",
    ),
}
KINDS = tuple(WORDINGS)
STATIC_KINDS = ("count", "shape_of_color", "color_of_shape", "position", "existence")

CAPTIONS: dict[str, str] = {
    "color": "List the objects by color.",
    "shape": "List the objects by shape.",
    "event_color": "List the events by color.",
    "event_shape": "List the events by shape.",
}
EVENTS: dict[Role, str] = {"moving": "moves", "flash": "flashes", "late": "appears", "static": "stays"}

ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "count": ("1", "2", "3", "4", "5", "6"),
    "position": POSITIONS,
    "existence": ("yes", "no"),
}
MAX_OPTIONS = 4


@dataclass(frozen=True, kw_only=True)
class SceneQuestion:
    """A question about a rendered scene, with its answer and the options of multiple choice."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...]


def answer_type(kind: str) -> str:
    """The key of ANSWERS from which a kind takes its answers: moving_color -> color, shape_of_color -> shape."""
    return kind.split("_of_")[0].split("_")[-1]


def vocabulary() -> list[str]:
    """Every word and punctuation mark of questions, answers and captions, sorted."""
    texts = [text for wordings in WORDINGS.values() for text in wordings]
    texts += [*CAPTIONS.values(), *EVENTS.values()] + [text for values in ANSWERS.values() for text in values]
    return words_of(texts)


def words_of(texts: Iterable[str]) -> list[str]:
    """The words and punctuation marks of lower-cased texts, sorted; what stands in braces is filled in later."""
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", "", text.lower()))})


def ask(scene: Scene, times: Sequence[float], rng: np.random.Generator) -> Iterator[SceneQuestion]:
    """One question of every kind that has one clear answer in frames taken at `times`, in the order of KINDS."""
    for kind in KINDS:
        facts = _FACTS[kind](scene, times)
        if facts:
            fill, answer = facts[int(rng.integers(len(facts)))]
            wording = WORDINGS[kind][int(rng.integers(len(WORDINGS[kind])))]
            yield SceneQuestion(
                kind=kind, text=wording.format(**fill), answer=answer, options=_options(kind, answer, scene, rng)
            )


def _options(kind: str, answer: str, scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    shown = {item.color for item in scene.objects} | {item.shape for item in scene.objects}
    return draw_options(ANSWERS[answer_type(kind)], answer, shown, rng)


def draw_options(answers: Sequence[str], answer: str, shown: set[str], rng: np.random.Generator) -> tuple[str, ...]:
    """Up to four shuffled options; things that the scene does show come first among the wrong ones."""
    wrong = [text for text in answers if text != answer]
    order = rng.permutation(len(wrong))
    # A stable sort: things that are seen first, in random order within both groups.
    chosen = sorted((wrong[i] for i in order), key=lambda text: text not in shown)[: MAX_OPTIONS - 1]
    return tuple(str(text) for text in rng.permutation([answer, *chosen]))


Fact = tuple[dict[str, str], str]


def _seen(scene: Scene, times: Sequence[float]) -> list[SceneObject]:
    return [item for item in scene.objects if any(item.visible(time) for time in times)]


def _lasting(scene: Scene, times: Sequence[float]) -> list[SceneObject]:
    return [item for item in _seen(scene, times) if item.role != "flash"]


def _role_fact(role: Role, attribute: str) -> Callable[[Scene, Sequence[float]], list[Fact]]:
    """Facts on the only object of a role; a late one must really be missing at first."""

    def facts(scene: Scene, times: Sequence[float]) -> list[Fact]:
        items = [item for item in _seen(scene, times) if item.role == role]
        if len(times) == 1 or (role == "late" and any(item.visible(times[0]) for item in items)):
            return []
        return [({}, getattr(item, attribute)) for item in items]

    return facts


def _count(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return [({}, str(len(scene.visible_at(times[-1]))))]


def _shape_of_color(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return [({"color": item.color}, item.shape) for item in _lasting(scene, times)]


def _color_of_shape(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return [({"shape": item.shape}, item.color) for item in _lasting(scene, times)]


def _position(scene: Scene, times: Sequence[float]) -> list[Fact]:
    """Objects at rest whose centre is clearly in one quadrant."""
    middle, margin = 48, 7
    items = [item for item in _lasting(scene, times) if item.role != "moving"]
    clear = [item for item in items if min(abs(item.x - middle), abs(item.y - middle)) > margin]
    return [({"color": item.color}, item.position(times[-1])) for item in clear]


def existence_facts(present: Sequence[str], hidden: Collection[str]) -> list[Fact]:
    """As many true as false statements, so that "yes" is right half the time.

    Args:
        present: colors that are seen.
        hidden: colors of all objects of the scene, which are not said to be absent.
    """
    absent = [color for color in COLORS if color not in hidden]
    return [({"color": color}, "yes") for color in present for _ in absent] + [
        ({"color": color}, "no") for color in absent for _ in present
    ]


def _existence(scene: Scene, times: Sequence[float]) -> list[Fact]:
    return existence_facts([item.color for item in _seen(scene, times)], {item.color for item in scene.objects})


_FACTS: dict[str, Callable[[Scene, Sequence[float]], list[Fact]]] = {
    "moving_color": _role_fact("moving", "color"),
    "moving_shape": _role_fact("moving", "shape"),
    "moving_direction": _role_fact("moving", "direction"),
    "flash_color": _role_fact("flash", "color"),
    "flash_shape": _role_fact("flash", "shape"),
    "late_color": _role_fact("late", "color"),
    "late_shape": _role_fact("late", "shape"),
    "count": _count,
    "shape_of_color": _shape_of_color,
    "color_of_shape": _color_of_shape,
    "position": _position,
    "existence": _existence,
}


def caption(scene: Scene, times: Sequence[float], form: str) -> tuple[str, str]:
    """A request from CAPTIONS and its answer, which names every object seen at `times`."""
    items = _seen(scene, times)
    # Objects in the order of the vocabulary, so that a scene has one right caption.
    if form in ("color", "shape"):
        # By event first, then by the attribute that is named first.
        items = sorted(items, key=lambda item: ANSWERS[form].index(getattr(item, form)))
        phrases = [" ".join([*_name(item, form), *_manner(item, times)]) for item in items]
    else:
        first = form.removeprefix("event_")
        items = sorted(
            items, key=lambda item: (list(EVENTS).index(item.role), ANSWERS[first].index(getattr(item, first)))
        )
        # The event stands in front, so only the direction or place follows the name.
        phrases = [" ".join([EVENTS[item.role], *_name(item, first), *_manner(item, times)[1:]]) for item in items]
    return CAPTIONS[form], " ".join(phrases)


def _name(item: SceneObject, first: str) -> list[str]:
    return [item.color, item.shape] if first == "color" else [item.shape, item.color]


def _manner(item: SceneObject, times: Sequence[float]) -> list[str]:
    """What the object does and, if it moves, where to, else where it is; in a single frame only the place shows."""
    if len(times) == 1:
        return [item.position(times[0])]
    return [EVENTS[item.role], item.direction or item.position(times[-1])]
