"""Rewards for form rather than content. Range: 0 or 1."""

from __future__ import annotations

import re

from dots_align.types import Response, reward_range
from reward_models.math import BOX, last_box

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


@reward_range(0, 1)
def ends_with_box(response: Response) -> float:
    r"""1 if the turn was ended and its text ends with exactly one `\boxed{…}`."""
    text, box = response.text.rstrip(" .。"), last_box(response.text)
    ended = response.finish_reason == "stop" and box is not None
    return float(ended and text.count(BOX) == 1 and text.endswith(f"{BOX}{box}}}"))


@reward_range(0, 1)
def thinks_then_answers(response: Response) -> float:
    """1 if the turn was ended and is one `<think>…</think>` with something in it, then an answer."""
    match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", response.text, re.DOTALL)
    if match is None or response.finish_reason != "stop":
        return 0.0
    return float(all(part.strip() and "think>" not in part for part in match.groups()))


@reward_range(0, 1)
def same_script(response: Response, mostly: float = 0.5) -> float:
    """1 if the response is in Chinese where the prompt's last turn is, and in another script where it is not: whether
    at least the share `mostly` of its letters are Chinese characters. Formulas and code do not count.
    """
    asked, given = (_share_of_han(text) for text in (response.prompt.messages[-1].content, response.text))
    return float(given is None or asked is None or (given >= mostly) == (asked >= mostly))


def _share_of_han(text: str) -> float | None:
    """Of the letters outside formulas and code; None if there are none. A word of Latin letters weighs as one."""
    prose = re.sub(r"```.*?```|`[^`\n]*`|\$[^$\n]*\$|\\[a-zA-Z]+(?:\{[^{}]*\})*", " ", text, flags=re.DOTALL)
    han = len(_HAN.findall(prose))
    words = len(re.findall(r"[^\W\d_]+", _HAN.sub(" ", prose)))
    return han / (han + words) if han + words else None
