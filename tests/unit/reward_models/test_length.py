"""Rewards for length and against repetition."""

from __future__ import annotations

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.length import FREE_TOKENS, brevity, repeated_share, repetition, soft_overlong


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


def of_length(tokens: int) -> Response:
    return Response(Prompt([Message("user", "q")]), "", list(range(tokens)))


@pytest.mark.parametrize(
    ("tokens", "score"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (1000, -1)]
)
def test_soft_overlong(tokens: int, score: float) -> None:
    """DAPO, equation 13, with L_max 100 and L_cache 20."""
    assert soft_overlong(of_length(tokens), 100, 20) == pytest.approx(score)


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_an_impossible_cache_is_refused(cache: int) -> None:
    with pytest.raises(ValueError, match="cache_tokens"):
        soft_overlong(of_length(1), 100, cache)


def test_repeated_share() -> None:
    assert repeated_share("abcdefgh", 4) == 0
    assert repeated_share("abcabc", 3) == pytest.approx(1 / 4)  # abc bca cab abc
    assert repeated_share("aaaaaaa", 3) == pytest.approx(4 / 5)
    assert repeated_share("ab", 3) == 0


def test_repetition() -> None:
    def of(ids: list[int], text: str = "") -> float:
        return repetition(Response(Prompt([Message("user", "q")]), text, ids))

    assert of(list(range(50))) == 0
    assert of([1] * 103) == pytest.approx(-(0.99 - 0.2) / 0.8)
    assert -1 < of([1, 2, 3, 4, 5] * 20) < -0.9
    assert of([], "这是一句话。" * 20) < -0.9
    assert of([], "a sentence in which hardly any word comes twice") == 0
