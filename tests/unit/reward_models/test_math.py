"""Verifiers: what counts as the right answer, and what does not."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.math import boxed_answer, final_answer, last_number, numeric_answer, same_answer


@pytest.fixture(autouse=True)
def _nothing_runs_while_garbage_is_collected() -> Iterator[None]:
    """Hypothesis times the collector by a callback in Python. An alarm that fires in there is lost, and a formula that
    takes for ever then does.
    """
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks


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
        (r"\boxed{x+1}", "1+x", 1),
        (r"\boxed{北京}", "北京", 1),
        ("72", "72", 0),
        (r"\boxed{72", "72", 0),
        (r"\boxed{}", "72", 0),
        ("", "72", 0),
        (r"\boxed{72 apples}", "72", 1),
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
    found = last_number(text)
    assert (found and found.value) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
        (r"(\frac{\pi}{2}, 3)", r"(3,\pi/2)", False),
        (r"x = 5", "5", True),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", True),
        (r"2, 1", "1, 2", True),
        (r"72 or 73", "72", False),
        (r"71, 72", "72", False),
        (r"(x+1)^2", "x^2+2x+1", True),
        (r"(x+1)^2", "x^2+2x+2", False),
        (r"\text{(C)}", "C", True),
        (r"\text{(B)}", "C", False),
        (r"90^\circ", "90", True),
        (r"\$18.90", "18.9", True),
        (r"11,\! 111", "11111", True),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}", True),
        (r"(2,\infty)", r"[2,\infty)", False),
        ("3/4", "6/8", True),
        ("3/0", "3", False),
        ("12%", "0.12", True),
        ("12%", "12", True),
        ("12", "12%", True),
        ("12%", "12%", True),
        ("0.12%", "12%", False),
        ("1200%", "12%", False),
        ("７２", "72", True),
        ("72个", "72", True),
        ("72元。", "72", True),
        ("￥72", "72", True),
        ("3.5万", "35000", True),
        ("1.2亿人", "120000000", True),
        ("百分之25", "25%", True),
        ("1又3/4", "1.75", True),
        ("１，０００", "1000", True),
        ("北京", "北京", True),
        ("上海", "北京", False),
        ("", "", False),
        ("1,23", "123", False),
    ],
)
def test_answers_by_what_they_mean(found: str, wanted: str, same: bool) -> None:
    assert same_answer(found, wanted) == same
    assert boxed_answer(response(rf"\boxed{{{found}}}", rf"So it is \boxed{{{wanted}}}.")) == same


@pytest.mark.parametrize(
    "formula", [r"9^{9^{9^{9}}}", r"(10^9)!", r"\prod_{k=1}^{10^8} k", r"(x+1)^{100000}", "(" * 400 + "1" + ")" * 400]
)
def test_a_formula_that_takes_for_ever_is_wrong(formula: str) -> None:
    assert not same_answer(formula, "x+7")


def test_formulas_are_compared_in_any_thread() -> None:
    """math-verify's own time limit works in the main thread only, and refuses others."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(same_answer, [r"\frac{1}{4}", r"\frac{1}{3}"], ["0.25", "0.25"]))
    assert found == [True, False]


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("答案是3/4。", "3/4", 1),
        ("答案是1/4。", "3/4", 0),
        ("出勤率是95%。", "95%", 1),
        ("一共有３６人", "36", 1),
        ("需要2.5万元", "25000", 0),  # the last number in running text, without what its unit stands for
        (r"\boxed{\frac{144}{2}}", "#### 72", 1),
        (r"\boxed{\frac{144}{3}}", "#### 72", 0),
        (r"\boxed{2^{6}+8}", "#### 72", 1),
    ],
)
def test_numbers_of_chinese_and_formulas(text: str, answer: str, score: float) -> None:
    assert numeric_answer(response(text, answer)) == score


# ------------------------------------------------------------------------------- real answers; all: check_verifiers.py


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_gsm8k_references(shared_data: Path) -> None:
    for row in _lines(shared_data / "gsm8k" / "test.jsonl")[::10]:
        head, _, end = row["answer"].rpartition("#### ")
        assert numeric_answer(response(row["answer"], row["answer"])) == 1
        assert boxed_answer(response(rf"{head}\boxed{{{end}}}", row["answer"])) == 1
        assert numeric_answer(response(f"{head}#### {int(end.replace(',', '')) + 1}", row["answer"])) == 0


def test_math500_references(shared_data: Path) -> None:
    golds = [final_answer(row["answer"]) for row in _lines(shared_data / "math500" / "test.jsonl")[::10]]
    for gold, other in zip(golds, [*golds[1:], golds[0]], strict=True):
        assert boxed_answer(response(rf"\boxed{{ {gold.replace('frac', 'dfrac')} }}", rf"\boxed{{{gold}}}")) == 1
        assert boxed_answer(response(rf"\boxed{{{gold}+1}}", rf"\boxed{{{gold}}}")) == 0
        assert boxed_answer(response(rf"\boxed{{{other}}}", gold)) == (gold == other)


def test_cmath_references(shared_data: Path) -> None:
    for row in _lines(shared_data / "cmath" / "test.jsonl")[::10]:
        assert numeric_answer(response(f"答案是{row['answer']}。", row["answer"])) == 1
        assert numeric_answer(response(f"答案是{row['answer'].rstrip('%')}7。", row["answer"])) == 0
