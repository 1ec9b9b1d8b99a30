"""Reading answers as text: which option the manifest's answer names, which one a model's output names."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from pipeline.errors import RowError

LETTERS = string.ascii_uppercase

_ARTICLE = r"(?!A\s+(?!(?:and|or|is|as|because|since)\b)[a-z])"
_ANNOUNCEMENT = r"(?i:\b(?:answer|option|choice)\W*(?:\s(?:is|was)\b|:)\W*(?:option\b\W*)?)"


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and extra white space, as exact match on short answers is counted."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def same_answer(output: str, answer: str) -> bool:
    """Whether an open answer is right: equal once case, punctuation and articles are taken away."""
    return normalize(output) == normalize(answer)


def resolve_answer(answer: str, options: Sequence[str]) -> int:
    """Index of the option that a manifest's `answer` names: its text, else its letter, else its index from 0.

    The text goes first, so with the options 2, 3, 4 the answer "3" is the second option.

    Raises:
        RowError: `bad_answer` when no option, or more than one, is meant.
    """
    matches = _equal_options(answer, options)
    if len(matches) > 1:
        fitting = [options[index] for index in matches]
        raise RowError("bad_answer", f"answer {answer!r} fits several options, {fitting}: make the options differ")
    if matches:
        return matches[0]
    label = re.fullmatch(r"\(?([A-Za-z])[).:]?|(\d+)", answer.strip())
    index = -1 if label is None else LETTERS.index(label[1].upper()) if label[1] else int(label[2])
    if not 0 <= index < len(options):
        raise RowError(
            "bad_answer",
            f"answer {answer!r} is none of the options {list(options)}: "
            "give the option's text, its letter or its index from 0",
        )
    return index


def parse_choice(output: str, options: Sequence[str]) -> int | None:
    """Index of the option that a model's output names, by its letter or its text; None when it can't be told.

    Read in this order: the whole output is an option's text; a letter at the start ("B", "(B)", "**B. red**"); the
    last letter that is announced ("the answer is B"); the only option whose text occurs; the only capital letter that
    stands alone. A capital A before a word is an article, not a letter. Reasoning up to `</think>` is not read.
    """
    output = output.rpartition("</think>")[2].strip()
    letters = LETTERS[: len(options)]
    start = re.match(rf"\W*([{letters}{letters.lower()}])(?:\W*$|\s*[).:,*\]}}\n])", output)
    announced = re.findall(rf"{_ANNOUNCEMENT}([{letters}])(?![\w'])", output)
    alone = {LETTERS.index(letter) for letter in re.findall(rf"(?<![\w'])({_ARTICLE}[{letters}])(?![\w'])", output)}
    readings = (
        _equal_options(output, options),
        [LETTERS.index(start[1].upper())] if start else [],
        [LETTERS.index(announced[-1])] if announced else [],
        _options_inside(output, options),
        sorted(alone),
    )
    return next((reading[0] for reading in readings if len(reading) == 1), None)


def _equal_options(text: str, options: Sequence[str]) -> list[int]:
    """Indices of the options that are `text`, letter by letter if there is one such, else normalised."""
    exact = [index for index, option in enumerate(options) if option.strip() == text.strip()]
    return exact or [index for index, option in enumerate(options) if normalize(option) == normalize(text)]


def _options_inside(output: str, options: Sequence[str]) -> list[int]:
    """Indices of the options whose words occur in `output`, without those that are part of a longer one."""
    inside = [index for index, option in enumerate(options) if _contains(output, option)]
    return [
        index
        for index in inside
        if not any(_contains(options[other], options[index]) for other in inside if other != index)
    ]


def _contains(text: str, words: str) -> bool:
    return f" {normalize(words)} " in f" {normalize(text)} "
