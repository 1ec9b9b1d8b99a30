import pytest

from pipeline.errors import RowError
from pipeline.model.choices import normalize, parse_choice, resolve_answer, same_answer

COLORS = ("red", "dark red", "a blue car", "green")


@pytest.mark.parametrize(
    ("answer", "index"),
    [("red", 0), (" Dark Red. ", 1), ("blue car", 2), ("D", 3), ("(b)", 1), ("C.", 2), ("0", 0), ("3", 3)],
)
def test_an_answer_may_be_text_letter_or_index(answer: str, index: int) -> None:
    assert resolve_answer(answer, COLORS) == index


def test_the_text_of_an_option_goes_before_letter_and_index() -> None:
    assert resolve_answer("3", ("2", "3", "4", "5")) == 1
    assert resolve_answer("A", ("C", "B", "A")) == 2
    assert resolve_answer("-1", ("1", "-1")) == 1


@pytest.mark.parametrize("answer", ["E", "4", "-1", "yellow", "", "re", "²"])
def test_an_answer_outside_the_options_is_named(answer: str) -> None:
    with pytest.raises(RowError) as raised:
        resolve_answer(answer, COLORS)
    assert raised.value.error_type == "bad_answer"
    assert repr(answer) in raised.value.message


def test_an_answer_that_fits_two_options_is_ambiguous() -> None:
    with pytest.raises(RowError, match=r"several options, \['a cat', 'Cat!'\]"):
        resolve_answer("the cat", ("a cat", "dog", "Cat!"))


@pytest.mark.parametrize(
    ("output", "index"),
    [
        ("A", 0),
        ("b", 1),
        ("(C)", 2),
        ("D.", 3),
        ("**B**", 1),
        ("**B. dark red**", 1),
        ("B) it is dark red, not green", 1),
        ("C: a blue car", 2),
        ("A\nBecause the car is green.", 0),
        ("The answer is A", 0),
        ("The answer is A because the car is green.", 0),
        ("**Answer**: (D)", 3),
        ("The correct option is B, as option A is lighter.", 1),
        ("Option A is too light. So the correct choice is: option C", 2),
        ("\\boxed{C}", 2),
        ("I would say D", 3),
        ("A is correct", 0),
        ("red", 0),
        ("Green.", 3),
        ("A blue car is in the picture.", 2),
        ("The object is dark red.", 1),
        ("<think>A or B? Option A is it.</think>\nB", 1),
    ],
)
def test_a_choice_is_read_from_the_output(output: str, index: int) -> None:
    assert parse_choice(output, COLORS) == index


@pytest.mark.parametrize("output", ["", "E", "A dog runs.", "A and B", "red or green", "I can't tell.", "yes", "Abe"])
def test_an_output_that_names_no_option_is_no_choice(output: str) -> None:
    assert parse_choice(output, COLORS) is None


def test_numbers_are_read_as_text_not_as_letters() -> None:
    assert parse_choice("There are 3 objects.", ("1", "2", "3", "13")) == 2


def test_open_answers_are_compared_without_case_punctuation_and_articles() -> None:
    assert same_answer("A red  car.", "Red car")
    assert not same_answer("red", "red car")
    assert normalize("The a") == "the a"
