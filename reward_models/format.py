"""Rewards for form rather than content. Range: 0 or 1."""

from __future__ import annotations

from dots_align.types import Response


def ends_with_box(response: Response) -> float:
    r"""1 if the turn was ended and its text ends with exactly one `\boxed{…}`."""
    text = response.text.rstrip(" .。")
    return float(response.finish_reason == "stop" and text.count("\\boxed{") == 1 and text.endswith("}"))
