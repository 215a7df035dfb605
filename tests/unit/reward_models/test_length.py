"""The reward for brevity."""

from __future__ import annotations

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.length import FREE_TOKENS, brevity


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [(0, 0), (FREE_TOKENS, 0), (FREE_TOKENS * 3 // 2, -0.5), (2 * FREE_TOKENS, -1), (100 * FREE_TOKENS, -1)],
)
def test_brevity(tokens: int, wanted: float) -> None:
    assert brevity(Response(Prompt([Message("user", "q")]), "", [0] * tokens)) == wanted


def test_brevity_never_rises_with_length() -> None:
    scores = [brevity(Response(Prompt([Message("user", "q")]), "", [0] * n)) for n in range(200)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == FREE_TOKENS + 1
