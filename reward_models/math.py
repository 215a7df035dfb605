"""Rewards for problems with one right answer, in Chinese or English. Range: 0 or 1.

Numbers are compared exactly, everything else by math-verify (github.com/huggingface/Math-Verify), which compares
formulas by what they mean.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from dots_align.types import Response, reward_range

BOX = r"\boxed{"
PARSE_SECONDS = 2  # a formula may be written so that it takes for ever; such an answer is wrong

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"[-+]?(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_NUMBER_IN_TEXT = re.compile(rf"{_DECIMAL}(?:/\d+)?%?")
# 3, -3.5, 1,000, 3/4, 1又3/4, 25%, 百分之25, 3万; then a unit of Chinese characters or a currency sign before it
_NUMBER = re.compile(
    rf"[$¥￥€£]?(?P<percent>百分之)?(?:(?P<whole>{_DIGITS})又)?(?P<number>{_DECIMAL})(?:/(?P<below>\d+))?(?P<sign>%?)"
    r"(?P<times>[万亿]?)[\u4e00-\u9fff]{0,6}"
)
_SCALE = {"": 1, "万": 10**4, "亿": 10**8}
_WORDS = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}")


class Number(NamedTuple):
    """A number as it was written; `percent` if with a percent sign, which `value` leaves out."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Number) -> bool:
        """Exactly; 50% is 0.5, and as good an answer as 50 where percent are asked for."""
        if self.value == other.value:
            return True
        percent, plain = (self, other) if self.percent else (other, self)
        return percent.percent and not plain.percent and percent.value == 100 * plain.value


@reward_range(0, 1)
def boxed_answer(response: Response) -> float:
    r"""1 if the turn was ended and its last `\boxed{…}` is the reference answer (itself text, a formula, or a solution
    with a box).
    """
    box, wanted = last_box(response.text), final_answer(response.prompt.answer or "")
    if box is None or response.finish_reason != "stop":
        return 0.0
    return float(same_answer(box, wanted))


@reward_range(0, 1)
def numeric_answer(response: Response) -> float:
    r"""1 if the answer ends with the reference answer's number, in `\boxed{…}`, after `####` or as the last one."""
    found, wanted = last_number(response.text), last_number(response.prompt.answer or "")
    if wanted is None:
        return 0.0
    if found is not None:
        return float(found.equals(wanted))
    box = last_box(response.text)  # a box without a plain number: a formula that may well have that value
    return float(box is not None and same_answer(box, str(wanted.value)))


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


def final_answer(text: str) -> str:
    r"""What a worked solution ends with: its last box, or what follows its last `####` (GSM8K), or all of it."""
    if (box := last_box(text)) is not None:
        return box
    return text.rpartition("####")[2].strip()


def last_number(text: str) -> Number | None:
    """The number a worked solution ends with: the last one of its last box, of what follows its last `####`, or of the
    whole. None if there is none, or if the box holds a formula.
    """
    ending = _WORDS.sub(r"\1", unicodedata.normalize("NFKC", final_answer(text)))
    if (whole := number(ending)) is not None:
        return whole
    if last_box(text) is not None and re.search(r"\\[a-zA-Z]|[\^_]", ending):
        return None
    found = _NUMBER_IN_TEXT.findall(ending)
    return number(found[-1]) if found else None


def number(text: str) -> Number | None:
    """The value of a text that is one number, with or without a unit of Chinese characters; None for any other."""
    text = unicodedata.normalize("NFKC", text)
    for written, plain in ((" ", ""), ("−", "-"), (r"\%", "%"), (r"\$", "$"), ("{,}", ","), (r",\!", ",")):
        text = text.replace(written, plain)
    match = _NUMBER.fullmatch(text.rstrip(".。"))
    if match is None or (match["below"] and not int(match["below"])):
        return None
    value = Fraction(match["number"].replace(",", "")) / int(match["below"] or 1)
    if match["whole"]:
        value += Fraction(match["whole"].replace(",", ""))
    return Number(value * _SCALE[match["times"]], bool(match["percent"] or match["sign"]))


def same_answer(found: str, wanted: str) -> bool:
    """Whether an answer, as it stands in a box, is the wanted one: the same text, number or formula."""
    found, wanted = found.strip(), wanted.strip()
    if not found or not wanted:
        return False
    a, b = number(found), number(wanted)
    if a is not None and b is not None:
        return a.equals(b)
    return found == wanted or _same_formula(found, wanted, threading.current_thread() is threading.main_thread())


@functools.lru_cache(maxsize=4096)
def _same_formula(found: str, wanted: str, main_thread: bool) -> bool:
    # Imported where it is needed: sympy takes longer to load than a batch of plain numbers to score.
    from math_verify import verify

    # Its time limits are signals, which only the main thread gets; elsewhere whoever calls has to set one.
    seconds = PARSE_SECONDS if main_thread else None
    gold, answer = _parsed(wanted, seconds), _parsed(found, seconds)
    return bool(gold and answer) and verify(gold, answer, timeout_seconds=seconds)


@functools.lru_cache(maxsize=4096)
def _parsed(formula: str, seconds: int | None) -> list:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of every answer it cannot read
    box = f"{BOX}{unicodedata.normalize('NFKC', formula)}}}"
    return parse(box, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=seconds)  # type: ignore[arg-type]
