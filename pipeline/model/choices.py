"""Reading a model's output: which option it names, and whether an open answer is right."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.manifest.options import LETTERS, equal_options, normalize

_ARTICLE = r"(?!A\s+(?!(?:and|or|is|as|because|since)\b)[a-z])"
_ANNOUNCEMENT = r"(?i:\b(?:answer|option|choice)\W*(?:\s(?:is|was)\b|:)\W*(?:option\b\W*)?)"


def same_answer(output: str, answer: str) -> bool:
    """Whether an open answer is right: equal once case, punctuation and articles are taken away."""
    return normalize(output) == normalize(answer)


def parse_choice(output: str, options: Sequence[str]) -> int | None:
    """Index of the option that a model's output names, by its letter or its text; None when it can't be told.

    Read in this order: the whole output is an option's text; a letter at the start ("B", "(B)", "**B. red**"); the
    last letter that is announced ("the answer is B"); the only option whose text occurs; the only capital letter that
    stands alone. A capital A before a word is an article, not a letter. Reasoning up to `</think>` is not read.
    """
    # Without `</think>` the last part is the whole output.
    output = output.rpartition("</think>")[2].strip()
    # Letters of existing options only, so that "E." among four options names none.
    letters = LETTERS[: len(options)]
    # At the start a lower-case letter counts as well, when a mark or the end follows it.
    start = re.match(rf"\W*([{letters}{letters.lower()}])(?:\W*$|\s*[).:,*\]}}\n])", output)
    announced = re.findall(rf"{_ANNOUNCEMENT}([{letters}])(?![\w'])", output)
    alone = {LETTERS.index(letter) for letter in re.findall(rf"(?<![\w'])({_ARTICLE}[{letters}])(?![\w'])", output)}
    # From the surest reading to the weakest; one that fits several options says nothing.
    readings = (
        equal_options(output, options),
        [LETTERS.index(start[1].upper())] if start else [],
        [LETTERS.index(announced[-1])] if announced else [],
        _options_inside(output, options),
        sorted(alone),
    )
    return next((reading[0] for reading in readings if len(reading) == 1), None)


def _options_inside(output: str, options: Sequence[str]) -> list[int]:
    """Indices of the options whose words occur in `output`, without those that are part of a longer one."""
    inside = [index for index, option in enumerate(options) if _contains(output, option)]
    # "dark red" holds "red", so only the longer one counts where both are options.
    return [
        index
        for index in inside
        if not any(_contains(options[other], options[index]) for other in inside if other != index)
    ]


def _contains(text: str, words: str) -> bool:
    return f" {normalize(words)} " in f" {normalize(text)} "
