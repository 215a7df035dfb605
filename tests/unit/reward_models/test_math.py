"""Verifiers: what counts as the right answer, and what does not."""

from __future__ import annotations

from decimal import Decimal

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.math import boxed_answer, last_number, numeric_answer


def response(text: str, answer: str | None, finish_reason: str = "stop") -> Response:
    return Response(Prompt([Message("user", "q")], answer), text, [1, 2, 3], finish_reason)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        (r"27+45: 7+5=12. \boxed{72}", "72", 1),
        (r"\boxed{72}", "72.0", 1),
        (r"\boxed{ 72 }", "72", 1),
        (r"\boxed{1,234}", "1234", 1),
        (r"\boxed{-5}", "-5", 1),
        (r"\boxed{5}", "-5", 0),
        (r"\boxed{0.50}", "0.5", 1),
        (r"\boxed{12} no, \boxed{72}", "72", 1),
        (r"\boxed{72} no, \boxed{12}", "72", 0),
        (r"\boxed{x+1}", "x+1", 1),
        (r"\boxed{x+1}", "1+x", 0),
        (r"\boxed{北京}", "北京", 1),
        ("72", "72", 0),
        (r"\boxed{72", "72", 0),
        (r"\boxed{}", "72", 0),
        ("", "72", 0),
        (r"\boxed{72 apples}", "72", 0),
    ],
)
def test_boxed_answer(text: str, answer: str, score: float) -> None:
    assert boxed_answer(response(text, answer)) == score


def test_boxed_answer_wants_the_turn_to_end() -> None:
    assert boxed_answer(response(r"\boxed{72}", "72", "length")) == 0


def test_boxed_answer_with_braces_inside() -> None:
    """A third of MATH's answers look like this."""
    assert boxed_answer(response(r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}")) == 1


@pytest.mark.parametrize("answer", [None, ""])
def test_an_empty_box_is_never_right(answer: str | None) -> None:
    assert boxed_answer(response(r"\boxed{}", answer)) == 0


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = 72.\n#### 72"


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("She sold 72.", GSM8K, 1),
        ("#### 72", GSM8K, 1),
        (r"48 and 24, so \boxed{72} clips", GSM8K, 1),
        ("#### 71", GSM8K, 0),
        ("72, or was it 71?", GSM8K, 0),
        ("#### 1,234", "#### 1234", 1),
        ("#### 1234", "#### 1,234", 1),
        ("about $1,234.50.", "#### 1234.5", 1),
        ("#### -3", "#### -3", 1),
        ("#### 3", "#### -3", 0),
        ("10 - 7 = 3 degrees", "#### 3", 1),
        ("It is .5", "#### 0.5", 1),
        ("72 dollars", "#### 72", 1),
        ("一共72个。", "#### 72", 1),
        ("50%", "#### 50", 1),
        (r"\boxed{\text{72 dollars}}", "#### 72", 1),
        (r"I first thought \boxed{71}, but \boxed{72}", "#### 72", 1),
        ("no number", "#### 72", 0),
        ("", "#### 72", 0),
        ("72", "", 0),
        ("no number", "none either", 0),
    ],
)
def test_numeric_answer(text: str, answer: str, score: float) -> None:
    assert numeric_answer(response(text, answer)) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567", "1234567"),
        ("3.14.", "3.14"),
        ("(7)", "7"),
        ("2, 3, 4", "4"),
        ("9 #### 5", "5"),
        (r"\boxed{8} 9", "8"),
        ("none", None),
        (r"\boxed{none} 9", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))
