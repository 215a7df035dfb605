"""Rewards for brevity. Range: -1 to 0."""

from __future__ import annotations

from dots_align.types import Response

FREE_TOKENS = 64


def brevity(response: Response) -> float:
    """0 up to `FREE_TOKENS` tokens, then falling linearly to -1 at twice as many."""
    return -min(max(len(response.response_ids) - FREE_TOKENS, 0) / FREE_TOKENS, 1.0)
