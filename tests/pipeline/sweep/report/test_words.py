"""Numbers as the report says them."""

import pytest

from pipeline.sweep.report.words import PERCENT, chance, gain, listed, mebibytes, percent, share


@pytest.mark.parametrize(("ratio", "said"), [(0.025, "2.5"), (0.1, "10"), (1.0, "100"), (1 / 3, "33.3333")])
def test_a_keep_ratio_has_no_more_digits_than_it_needs(ratio: float, said: str) -> None:
    assert share(ratio) == said + PERCENT


def test_an_accuracy_keeps_its_digits() -> None:
    assert percent(0.5) == f"50.0{PERCENT}"
    assert percent(0.98765, digits=2) == f"98.77{PERCENT}"


def test_a_gain_has_its_sign_and_a_loss_a_true_minus() -> None:
    assert gain(0.0123) == "+1.2"
    assert gain(-0.05) == "\N{MINUS SIGN}5.0"


def test_words_are_joined_as_in_a_sentence() -> None:
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_a_p_value_is_never_said_to_be_zero() -> None:
    assert chance(0.0) == chance(0.00099) == "< 0.001"
    assert chance(0.0412) == "0.041"


def test_memory_has_decimals_where_it_is_little() -> None:
    assert mebibytes(2.5 * 2**20) == "2.50 MiB"
    assert mebibytes(12345 * 2**20) == "12,345 MiB"
