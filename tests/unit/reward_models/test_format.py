"""Rewards for form."""

from __future__ import annotations

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.format import ends_with_box, same_script, thinks_then_answers


def score(text: str, finish_reason: str = "stop") -> float:
    return ends_with_box(Response(Prompt([Message("user", "q")]), text, [1], finish_reason))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"1+1: \boxed{2}", 1),
        (r"\boxed{2}.", 1),
        (r"答案是\boxed{2}。", 1),
        (r"\boxed{2} ", 1),
        (r"\boxed{2} apples", 0),
        (r"\boxed{1} \boxed{2}", 0),
        (r"\boxed{2", 0),
        ("2", 0),
        ("", 0),
        ("}", 0),
    ],
)
def test_ends_with_box(text: str, wanted: float) -> None:
    assert score(text) == wanted


def test_an_unfinished_turn_does_not_count() -> None:
    assert score(r"\boxed{2}", "length") == 0


def test_another_brace_at_the_end_is_no_box() -> None:
    assert score(r"\boxed{2} and {more}") == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>Hm.</think>Two.", 1),
        (" <think>\nHm.\n</think>\n\n两个。", 1),
        ("<think></think>Two.", 0),
        ("<think>Hm.</think>", 0),
        ("Two.", 0),
        ("Well <think>Hm.</think>Two.", 0),
        ("<think>Hm.</think>Two.<think>Or three.</think>", 0),
        ("<think>Hm.<think>Hm.</think>Two.", 0),
        ("<think>Hm. Two.", 0),
    ],
)
def test_thinks_then_answers(text: str, wanted: float) -> None:
    asked = Prompt([Message("user", "q")])
    assert thinks_then_answers(Response(asked, text)) == wanted
    assert thinks_then_answers(Response(asked, text, finish_reason="length")) == 0


@pytest.mark.parametrize(
    ("question", "answer", "wanted"),
    [
        ("一共有多少只狗？", "一共有三只狗。", 1),
        ("一共有多少只狗？", "There are three dogs.", 0),
        ("How many dogs?", "There are three dogs.", 1),
        ("How many dogs?", "一共有三只狗。", 0),
        ("如何用Python写一个循环？", "用 for 语句：\n```python\nfor item in range(10):\n    print(item)\n```", 1),
        ("求x", r"设 $x = y$，所以 \boxed{3}", 1),
        ("1+1=", "2", 1),
        ("多少？", "42", 1),
    ],
)
def test_same_script(question: str, answer: str, wanted: float) -> None:
    assert same_script(Response(Prompt([Message("user", question)]), answer)) == wanted
