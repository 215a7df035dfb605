"""Rewards for problems with one right answer. Range: 0 or 1."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from dots_align.types import Response

BOX = r"\boxed{"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def boxed_answer(response: Response) -> float:
    r"""1 if the turn was ended and its last `\boxed{…}` holds the reference answer, compared as numbers where both
    are.
    """
    box, wanted = last_box(response.text), (response.prompt.answer or "").strip()
    if box is None or not wanted or response.finish_reason != "stop":
        return 0.0
    return float(_same(box, wanted))


def numeric_answer(response: Response) -> float:
    r"""1 if the last number of the answer (in `\boxed{…}`, after `####`, or at the end) is the reference answer's
    last number.
    """
    found, wanted = last_number(response.text), last_number(response.prompt.answer or "")
    return float(found is not None and found == wanted)


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds, braces inside included; None if there is no closed box."""
    found, start = None, text.find(BOX)
    while start >= 0:
        depth, at = 1, start + len(BOX)
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            found = text[start + len(BOX) : at - 1]
        start = text.find(BOX, start + len(BOX))
    return found


def last_number(text: str) -> Decimal | None:
    """The number a worked solution ends with: boxed if there is a box, after `####` (GSM8K) if there is one, else
    the last.
    """
    if (box := last_box(text)) is not None:
        text = box
    elif "####" in text:
        text = text.rpartition("####")[2]
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None


def _same(found: str, wanted: str) -> bool:
    a, b = _decimal(found), _decimal(wanted)
    return a == b if a is not None and b is not None else found.strip() == wanted.strip()
