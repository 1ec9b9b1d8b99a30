"""The options of multiple choice: labels that a manifest wrote before them, and which of them its answer names."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import RowError

LETTERS = string.ascii_uppercase

_LABEL = re.compile(r"\s*(?:(?P<open>[(\[])(?P<inner>[A-Za-z])[)\]]\s*|(?P<bare>[A-Za-z])(?P<end>[.:](?=\s|$)|\))\s*)")
_PUNCTUATION = re.compile(r"[^\w\s]")


class Label(NamedTuple):
    """A label that stands before an option's text, such as the one of "(B) red"."""

    style: str
    """What is written around the letter, and in which case it is."""
    option: int
    """Index of the option that the letter means."""
    text: str
    """The option's text, without the label."""


def read_label(text: str) -> Label | None:
    """The label at the beginning of a text: "A. ", "A: ", "A) ", "(A) " or "[A] ", in either case; None without one."""
    match = _LABEL.match(text)
    if match is None:
        return None
    letter = match["inner"] or match["bare"]
    style = (match["open"] or match["end"]) + ("A" if letter.isupper() else "a")
    return Label(style, LETTERS.index(letter.upper()), text[match.end() :])


def strip_labels(options: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The options without their labels, and whether they had any.

    They have when all of them carry consecutive letters from A in one style; "A. Lincoln" beside "U. Grant" has not.
    Options that are nothing but labels stay as they are.
    """
    # Most options have no label, which the first one tells.
    if not options or read_label(options[0]) is None:
        return tuple(options), False
    labels = [label for option in options if (label := read_label(option)) is not None]
    # A, B, C, ... in this order; the length counts options without a label as well.
    consecutive = [label.option for label in labels] == list(range(len(options)))
    if not consecutive or len({label.style for label in labels}) > 1 or not any(label.text for label in labels):
        return tuple(options), False
    return tuple(label.text for label in labels), True


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and extra white space, as exact match on short answers is counted."""
    words = _PUNCTUATION.sub(" ", text.lower()).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def equal_options(text: str, options: Sequence[str]) -> list[int]:
    """Indices of the options that are `text`, letter by letter if there is one such, else normalised."""
    exact = [index for index, option in enumerate(options) if option.strip() == text.strip()]
    if exact:
        return exact
    wanted = normalize(text)
    return [index for index, option in enumerate(options) if normalize(option) == wanted]


def resolve_answer(answer: str, options: Sequence[str], *, number: bool = False) -> int:
    """Index of the option that a manifest's `answer` names.

    An answer is read as an option's text (with or without its label), else as its letter, else as its index from 0. So
    with the options "2", "3", "4" the answer "3" is the second option.

    Args:
        number: whether the answer was written as a number, or so that it can't be told from one. It may then be an
            index as well as a text, and is refused when these are two different options.

    Raises:
        RowError: `bad_answer` when no option, or more than one, is meant.
    """
    # All readings that the options allow: as a text, and as a number from 0.
    texts, index = _indices_by_text(answer, options), _index_by_digits(answer, options)
    if number and texts and index is not None and texts != [index]:
        raise RowError(
            "bad_answer",
            f"answer {answer} can be the option {options[texts[0]]!r} or the index of {options[index]!r}: "
            "say which one in a column answer_index, which counts from 0",
        )
    if len(texts) > 1:
        fitting = [options[index] for index in texts]
        raise RowError("bad_answer", f"answer {answer!r} fits several options, {fitting}: make the options differ")
    # "B", "(B)", "B." or "B:" alone, in either case.
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]?", answer.strip())
    # In order of precedence; the first one counts.
    readings = [*texts, *([LETTERS.index(letter[1].upper())] if letter else []), *([] if index is None else [index])]
    if not readings or readings[0] >= len(options):
        raise RowError(
            "bad_answer",
            f"answer {answer!r} is none of the options {list(options)}: "
            "give the option's text or letter, or its index from 0 in a column answer_index",
        )
    return readings[0]


def check_index(index: int, answer: str | None, options: Sequence[str]) -> int:
    """`index` itself, once it is known to name an option, and one that `answer` (where there is one) can mean.

    Raises:
        RowError: `bad_answer`.
    """
    if not 0 <= index < len(options):
        raise RowError("bad_answer", f"answer_index is {index}; for {len(options)} options it must be below that")
    # An answer that could also mean this option doesn't contradict the index.
    if answer is None or index in (*_indices_by_text(answer, options), _index_by_digits(answer, options)):
        return index
    if resolve_answer(answer, options) != index:
        raise RowError(
            "bad_answer", f"answer_index is {index}, which is {options[index]!r}, but answer is {answer!r}: correct one"
        )
    return index


def _indices_by_text(answer: str, options: Sequence[str]) -> list[int]:
    """Indices of the options whose text is the answer, which may carry the label of that option."""
    # "(B) red" names the option "red" only if that is the second one.
    label = read_label(answer)
    exact = [index for index, option in enumerate(options) if option.strip() == answer.strip()]
    if exact or label is None or label.option >= len(options) or not label.text:
        return exact or equal_options(answer, options)
    return [index for index in equal_options(label.text, options) if index == label.option]


def _index_by_digits(answer: str, options: Sequence[str]) -> int | None:
    index = int(answer) if re.fullmatch(r"\s*\d{1,9}\s*", answer) else len(options)
    return index if index < len(options) else None
