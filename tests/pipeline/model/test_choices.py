import pytest

from pipeline.manifest.options import normalize
from pipeline.model.choices import parse_choice, same_answer

COLORS = ("red", "dark red", "a blue car", "green")


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
