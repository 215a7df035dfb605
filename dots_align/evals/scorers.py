"""Scorers of short answers, which tasks name. Light: they run in scoring processes."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter

from dots_align.types import Response, reward_range

_SAID = re.compile(
    r"(?:answer|option|choice)\s*(?:is|:)?\s*[:：]?\s*\(?\**\s*([A-Z])\b|(?:答案|选项|选择)\s*(?:是|为|应为)?\s*[:：]?\s*[（(]?\**\s*([A-Z])",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\b")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@reward_range(0, 1)
def choice_letter(response: Response) -> float:
    """1 if the letter the answer settles on is the reference: in its last box, else behind its last "answer is"
    (答案是), else a short answer's only capital letter that stands alone.
    """
    return float(letter_in(response.text) == (response.prompt.answer or "").strip())


def letter_in(text: str) -> str | None:
    """The letter an answer settles on; None if it settles on none."""
    text = unicodedata.normalize("NFKC", text)
    if boxes := _BOX.findall(text):
        return boxes[-1]
    if said := [a or b for a, b in _SAID.findall(text) if (a or b).isupper()]:
        return said[-1]
    alone = set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z'’])", text)) if len(text) < 40 else set()
    return alone.pop() if len(alone) == 1 else None


@reward_range(0, 1)
def contains_answer(response: Response) -> float:
    """1 if the reference (or one of a JSON list of them) occurs in the answer, letter case and width aside."""
    text = _plain(response.text)
    return float(any(_plain(wanted) in text for wanted in _references(response)))


@reward_range(0, 1)
def share_contained(response: Response) -> float:
    """The share of a JSON list of references that occur in the answer."""
    text, wanted = _plain(response.text), _references(response)
    return sum(_plain(w) in text for w in wanted) / len(wanted)


@reward_range(0, 1)
def exact_words(response: Response) -> float:
    """1 if the last line of the answer, without articles and punctuation, is one of the references."""
    found = " ".join(_words(_last_line(response.text)))
    return float(any(found == " ".join(_words(wanted)) for wanted in _references(response)))


@reward_range(0, 1)
def f1_words(response: Response) -> float:
    """The highest F1 over words of the last line of the answer with one of the references; a reference with numbers
    counts only where the answer has one of them.
    """
    return max(_f1(_words(_last_line(response.text)), _words(wanted)) for wanted in _references(response))


def _f1(found: list[str], wanted: list[str]) -> float:
    numbers = {word for word in wanted if word.replace(".", "", 1).isdigit()}
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common or (numbers and not numbers & set(found)):
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^.*?(?:answer is|answer:)\s*", "", lines[-1], flags=re.IGNORECASE) if lines else ""


def _words(text: str) -> list[str]:
    words = []
    for word in re.split(r"[\s-]+", _plain(text)):
        plain = word.replace(",", "").strip(string.punctuation)
        if not plain.replace(".", "", 1).isdigit():
            plain = "".join(c for c in word if c not in string.punctuation)
        if plain and not _ARTICLES.fullmatch(plain):
            words.append(plain)
    return words


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _references(response: Response) -> list[str]:
    answer = response.prompt.answer or ""
    try:
        found = json.loads(answer)
    except ValueError:
        return [answer]
    return [str(item) for item in found] if isinstance(found, list) and found else [answer]
