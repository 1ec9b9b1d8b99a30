"""Values of a row: what is read of them, and what is refused by name."""

from decimal import Decimal

import pytest

from pipeline.errors import RowError
from pipeline.manifest.fields import answer_index, optional_text, required_text, span


@pytest.mark.parametrize("value", [2, 2.0, "2", " 2.0 ", Decimal("2.0")])
def test_seconds_may_be_numbers_or_text(value: object) -> None:
    assert span({"start": value}) == (2.0, None)
    assert span({"end": value}) == (None, 2.0)


@pytest.mark.parametrize("value", [None, ""])
def test_a_span_may_be_open(value: object) -> None:
    assert span({"start": value, "end": value}) == span({}) == (None, None)


@pytest.mark.parametrize("value", [-1, "x", True, [2], {"s": 2}, float("nan"), float("inf"), "inf", 10**400])
@pytest.mark.parametrize("name", ["start", "end"])
def test_what_is_no_time_is_refused_with_its_name(name: str, value: object) -> None:
    with pytest.raises(RowError, match=f"^bad_row: {name} is ") as raised:
        span({name: value})
    assert repr(value) in raised.value.message


def test_a_span_must_not_end_before_it_starts() -> None:
    with pytest.raises(RowError, match="end is 1, not after start, 2"):
        span({"start": 2, "end": 1})
    with pytest.raises(RowError, match="not after start, 0"):
        span({"end": 0})


def test_whole_numbers_stand_for_texts_and_nothing_else_does() -> None:
    assert optional_text({"answer": 12}, "answer") == "12"
    for value in (True, 1.5, ["a"]):
        with pytest.raises(RowError, match="must be a text"):
            optional_text({"answer": value}, "answer")
    with pytest.raises(RowError, match="not empty"):
        required_text({"question": "  "}, "question")


@pytest.mark.parametrize("value", [3, 3.0, Decimal(3), "3"])
def test_an_index_may_be_a_float_where_a_table_made_it_one(value: object) -> None:
    assert answer_index({"answer_index": value}) == 3


@pytest.mark.parametrize("value", [1.5, True, "three", [3]])
def test_an_index_that_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(RowError, match=r"^bad_answer: answer_index is "):
        answer_index({"answer_index": value})
