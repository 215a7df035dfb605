"""The reward for ending with one box."""

from __future__ import annotations

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.format import ends_with_box


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
