"""Rewards for form rather than content. Range: 0 or 1."""

from __future__ import annotations

from dots_align.types import Response


def ends_with_box(response: Response) -> float:
    r"""1 if the turn was ended and its text ends with exactly one `\boxed{…}`."""
    text = response.text.rstrip(" .。")
    start = text.find("\\boxed{")
    if response.finish_reason != "stop" or start < 0 or text.count("\\boxed{") != 1:
        return 0.0
    depth, closes = 0, []
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "}" and depth == 0:
            closes.append(at)
    return float(bool(closes) and closes[0] == len(text) - 1)
