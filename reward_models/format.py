"""Rewards for form rather than content. Range: 0 or 1."""

from __future__ import annotations

from dots_align.types import Response
from reward_models.math import BOX, last_box


def ends_with_box(response: Response) -> float:
    r"""1 if the turn was ended and its text ends with exactly one `\boxed{…}`."""
    text, box = response.text.rstrip(" .。"), last_box(response.text)
    ended = response.finish_reason == "stop" and box is not None
    return float(ended and text.count(BOX) == 1 and text.endswith(f"{BOX}{box}}}"))
