"""The values of one manifest row, read and checked.

Raises:
    RowError: by every function here, `bad_row` for a value that can't be used; it names the value and what it must be.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal

from pipeline.errors import RowError
from pipeline.manifest.options import check_index, resolve_answer, strip_labels

_SURROGATE = re.compile("[\ud800-\udfff]")
_FRACTIONAL = (float, Decimal)
Record = Mapping[str, object]
"""A row as the file has it; what its values are is checked here."""


def required_text(record: Record, name: str) -> str:
    value = optional_text(record, name)
    if not (value and value.strip()):
        raise _bad(f"{name} is {value!r}; it must be a text that is not empty")
    return value


def optional_text(record: Record, name: str) -> str | None:
    """Text as it is; a whole number as its digits, since ids and answers are often written so."""
    value = record.get(name)
    if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
        raise _bad(f"{name} is {value!r}; it holds half of a surrogate pair, which is no text")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _bad(f"{name} is {value!r}; it must be a text")


def span(record: Record) -> tuple[float | None, float | None]:
    """`start` and `end` in seconds."""
    start, end = (_seconds(record, name) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise _bad(f"end is {end:g}, not after start, {start or 0.0:g}")
    return start, end


def options(record: Record) -> tuple[tuple[str, ...] | None, bool]:
    """The options without labels such as "A. ", and whether they had any; None for an open question."""
    value = record.get("options")
    if value is None or value == "":
        return None, False
    # CSV has no lists, so the cell holds JSON.
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _bad(f"options is {value!r}, not a JSON list ({error})") from error
    if not isinstance(value, list) or len(value) < 2:
        raise _bad(f"options is {value!r}; it must be a list of at least two texts")
    # Options are compared without the white space around them, but kept with it.
    texts, labelled = strip_labels([optional_text({"options": option}, "options") or "" for option in value])
    bare = [text.strip() for text in texts]
    if not all(bare):
        raise _bad(f"options is {value!r}; no option may be empty")
    if len(set(bare)) < len(bare):
        repeated = [text for text in bare if bare.count(text) > 1]
        raise _bad(f"options is {value!r}; {repeated[0]!r} stands there twice, and the options must differ")
    return texts, labelled


def answer(record: Record, texts: tuple[str, ...] | None, *, typed: bool) -> tuple[str | None, int | None]:
    """The answer as text, and the index of the option that it or `answer_index` names.

    Args:
        texts: the options; None for an open question.
        typed: whether the file tells the text "1" from the number 1, as all but CSV do.

    Raises:
        RowError: also `bad_answer`, when it can't be said which option is right.
    """
    # pandas writes the whole number 3 as 3.0 in a column with gaps; `_whole` undoes that.
    value, index = _whole(record.get("answer")), answer_index(record)
    text = optional_text({"answer": repr(value) if isinstance(value, float) else value}, "answer")
    text = text if text and text.strip() else None
    # An open question: the answer is text, and there is nothing for an index to count.
    if texts is None:
        if index is not None:
            raise RowError("bad_answer", f"answer_index is {index}, but the row has no options")
        return text, None
    if index is not None:
        return text, check_index(index, text, texts)
    if text is None:
        return None, None
    # In CSV every cell is text, so "1" may have been meant as a number.
    return text, resolve_answer(text, texts, number=not (typed and isinstance(value, str)))


def answer_index(record: Record) -> int | None:
    value = _whole(record.get("answer_index"))
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
        value = int(value)
    if value is None or value == "":
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise RowError("bad_answer", f"answer_index is {value!r}; it must be a whole number, the first option being 0")
    return value


def as_text(value: object) -> str | None:
    """A value of a row that can't be used, as text for the output."""
    return None if value is None else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", str(value))


def _seconds(record: Record, name: str) -> float | None:
    value = record.get(name)
    if value is None or value == "":
        return None
    seconds = math.nan
    if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            seconds = float(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise _bad(f"{name} is {value!r}; it must be a number of seconds, 0 or more")
    return seconds


def _whole(value: object) -> object:
    """A whole number as such where a table had to make a float of it, as pandas does in a column with gaps."""
    if isinstance(value, _FRACTIONAL):
        return None if math.isnan(value) else int(value) if value == value // 1 else float(value)
    return value


def _bad(message: str) -> RowError:
    return RowError("bad_row", message)
