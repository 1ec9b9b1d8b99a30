"""Labels are told from texts that begin alike, and an answer names one option or none."""

import pytest

from pipeline.errors import RowError
from pipeline.manifest.options import check_index, resolve_answer, strip_labels

COLORS = ("red", "dark red", "a blue car", "green")


@pytest.mark.parametrize("label", ["{}. ", "{}) ", "{}: ", "({}) ", "[{}] ", " {}.\t", "({})", "{})"])
@pytest.mark.parametrize("letters", ["ABCD", "abcd"])
def test_labels_in_one_style_are_taken_away(label: str, letters: str) -> None:
    labelled = [label.format(letter) + text for letter, text in zip(letters, COLORS, strict=True)]
    assert strip_labels(labelled) == (COLORS, True)


@pytest.mark.parametrize(
    "options",
    [
        ("A. red", "B. blue", "D. green"),
        ("B. red", "C. blue"),
        ("B. red", "A. blue"),
        ("A. red", "blue", "C. green"),
        ("A. red", "blue"),
        ("A. red", "B) blue"),
        ("A. red", "b. blue"),
        ("(A) red", "B) blue"),
        ("A. Lincoln", "U. Grant"),
        ("A.D.", "B.C."),
        ("A car", "B road"),
        ("Ann: red", "Bob: blue"),
        ("A", "B", "C"),
        ("A.", "B."),
        ("1. red", "2. blue"),
    ],
)
def test_other_beginnings_are_part_of_the_option(options: tuple[str, ...]) -> None:
    assert strip_labels(options) == (options, False)


def test_labels_are_taken_away_once() -> None:
    assert strip_labels(["A. B. King", "B. A. Smith"]) == (("B. King", "A. Smith"), True)


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        *(("red", 0), (" Dark Red. ", 1), ("blue car", 2), ("D", 3), ("(b)", 1), ("C.", 2), ("0", 0), ("3", 3)),
        *(("B. dark red", 1), ("(d) Green", 3), ("A: red", 0), ("B. ", 1)),
    ],
)
def test_an_answer_may_be_text_letter_or_index(answer: str, index: int) -> None:
    assert resolve_answer(answer, COLORS) == index


def test_the_text_of_an_option_goes_before_letter_and_index() -> None:
    assert resolve_answer("3", ("2", "3", "4", "5")) == 1
    assert resolve_answer("A", ("C", "B", "A")) == 2
    assert resolve_answer("-1", ("1", "-1")) == 1


@pytest.mark.parametrize("answer", ["E", "4", "-1", "yellow", "", "re", "²", "9" * 5000, "A. green", "D. red"])
def test_an_answer_outside_the_options_is_named(answer: str) -> None:
    with pytest.raises(RowError) as raised:
        resolve_answer(answer, COLORS)
    assert raised.value.error_type == "bad_answer"
    assert repr(answer) in raised.value.message
    assert "answer_index" in raised.value.message


def test_a_label_that_belongs_to_another_option_is_no_article() -> None:
    """Without punctuation and articles "A. white" is "white", the second option."""
    with pytest.raises(RowError, match="none of the options"):
        resolve_answer("A. white", ("black", "white"))


def test_an_answer_that_fits_two_options_is_ambiguous() -> None:
    with pytest.raises(RowError, match=r"several options, \['a cat', 'Cat!'\]"):
        resolve_answer("the cat", ("a cat", "dog", "Cat!"))


@pytest.mark.parametrize("options", [("1", "2", "3"), ("3", "1", "2"), ("one", "1", "1.")])
def test_a_number_that_may_be_a_text_or_an_index_is_refused(options: tuple[str, ...]) -> None:
    readings = {options.index("1"), 1}
    if len(readings) == 1:
        assert resolve_answer("1", options, number=True) == 1
        return
    with pytest.raises(RowError, match=r"answer 1 can be the option '1' or the index of .* column answer_index"):
        resolve_answer("1", options, number=True)
    assert resolve_answer("1", options) == options.index("1"), "as a text it is one"


def test_a_number_with_one_meaning_is_read() -> None:
    assert resolve_answer("1", ("0", "1", "2"), number=True) == 1, "text and index agree"
    assert resolve_answer("3", ("1", "2", "3"), number=True) == 2, "too large for an index"
    assert resolve_answer("2", COLORS, number=True) == 2, "no option's text"


@pytest.mark.parametrize(
    ("index", "answer"), [(0, None), (0, "1"), (1, "1"), (1, "B"), (2, "3"), (2, "C. 3"), (1, "2")]
)
def test_an_index_that_agrees_with_the_answer_is_taken(index: int, answer: str | None) -> None:
    assert check_index(index, answer, ("1", "2", "3")) == index


@pytest.mark.parametrize(("index", "answer"), [(0, "B"), (2, "1"), (0, "C. 3"), (3, None), (-1, None), (0, "blue")])
def test_an_index_that_contradicts_the_answer_is_refused(index: int, answer: str | None) -> None:
    with pytest.raises(RowError, match="answer") as raised:
        check_index(index, answer, ("1", "2", "3"))
    assert raised.value.error_type == "bad_answer"
