"""Rewards for length and against repetition. Range: -1 to 0."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dots_align.types import Response, reward_range

FREE_TOKENS = 64


@reward_range(-1, 0)
def brevity(response: Response, free_tokens: int = FREE_TOKENS) -> float:
    """0 up to `free_tokens` tokens, then falling linearly to -1 at twice as many."""
    return -min(max(len(response.response_ids) - free_tokens, 0) / free_tokens, 1.0)


@reward_range(-1, 0)
def soft_overlong(response: Response, max_tokens: int, cache_tokens: int) -> float:
    """DAPO's soft overlong penalty (arXiv:2503.14476, equation 13): 0 up to `max_tokens - cache_tokens` tokens, then
    falling linearly to -1 at `max_tokens`; -1 beyond.

    Raises:
        ValueError: `cache_tokens` is not between 1 and `max_tokens`.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens={cache_tokens} must be between 1 and max_tokens={max_tokens}")
    over = len(response.response_ids) - (max_tokens - cache_tokens)
    return -min(max(over, 0) / cache_tokens, 1.0)


@reward_range(-1, 0)
def repetition(response: Response, n: int = 4, free_share: float = 0.2) -> float:
    """0 while at most `free_share` of the n-grams have been there before, then falling linearly to -1 if all have.

    Of the sampled tokens; of words, and characters of Chinese, where there are none.
    """
    share = repeated_share(
        response.response_ids or re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", response.text), n
    )
    return -max(share - free_share, 0.0) / (1.0 - free_share)


def repeated_share(items: Sequence[object], n: int) -> float:
    """The share of the n-grams that have occurred before; 0 if there are none."""
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
