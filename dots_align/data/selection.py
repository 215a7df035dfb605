"""Which of a model's own answers it should learn from: right ones, each once, balanced by difficulty."""

from __future__ import annotations

import random
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dots_align.config import SelectionSection


@dataclass(frozen=True)
class Answer:
    """One sampled answer: the `sample`-th to prompt `prompt` (its index), and whether it may be learned from."""

    prompt: int
    sample: int
    text: str
    right: bool


@dataclass(frozen=True)
class Bin:
    """Prompts whose pass rate lies above `low` and not above `high`, how many of their answers are right, and how many
    of those were kept.
    """

    low: float
    high: float
    prompts: int
    right: int
    kept: int


@dataclass(frozen=True)
class Selected:
    """The answers that were kept, in the order of prompts, with their prompt's pass rate, and what became of the
    others: `exact` and `normalised` duplicates were right, but said before.
    """

    answers: list[Answer]
    pass_rates: dict[int, float]
    exact: int
    normalised: int
    bins: list[Bin]
    never_right: int = field(default=0)


def normalised(text: str) -> str:
    """What two texts have in common that say the same: letters, digits and signs, without case and width, spaces only
    where they part words or numbers. A superscript stays one.
    """
    marked = "".join("^" + c if unicodedata.decomposition(c).startswith("<super>") else c for c in text)
    plain = " ".join(unicodedata.normalize("NFKC", marked).casefold().split())
    return re.sub(r"(?<![a-z0-9]) | (?![a-z0-9])", "", plain)


def select(prompts: Sequence[str], answers: Sequence[Answer], selection: SelectionSection, seed: int) -> Selected:
    """Keeps right answers: each once, of a prompt as many as its bin allows, of a bin no more than its share.

    Args:
        prompts: the text of each prompt; prompts that say the same share their duplicates.
        answers: to all prompts, in any order.
        seed: of the choice which answers of a bin too large are dropped.
    """
    rates = pass_rates(answers)
    unique, exact, same = distinct(prompts, sorted(answers, key=lambda a: (a.prompt, a.sample)))
    edges = selection.pass_rate_bins
    bin_of = {prompt: bisect_left(edges, rate) for prompt, rate in rates.items() if rate > 0}
    members: list[list[Answer]] = [[] for _ in edges]
    taken: Counter[int] = Counter()
    for answer in unique:
        number = bin_of[answer.prompt]
        if taken[answer.prompt] < selection.caps[number]:
            taken[answer.prompt] += 1
            members[number].append(answer)
    limits = bin_limits([len(m) for m in members], selection.max_bin_share)
    kept = [_some(m, limit, f"{seed}-{number}") for number, (m, limit) in enumerate(zip(members, limits, strict=True))]
    right = Counter(bin_of[a.prompt] for a in answers if a.right)
    sizes = Counter(bin_of.values())
    lows = (0.0, *edges)
    bins = [Bin(lows[i], edges[i], sizes[i], right[i], len(kept[i])) for i in range(len(edges))]
    chosen = sorted((a for m in kept for a in m), key=lambda a: (a.prompt, a.sample))
    return Selected(chosen, rates, exact, same, bins, sum(rate == 0 for rate in rates.values()))


def pass_rates(answers: Sequence[Answer]) -> dict[int, float]:
    """Of each prompt the share of its answers that are right."""
    asked, right = Counter(a.prompt for a in answers), Counter(a.prompt for a in answers if a.right)
    return {prompt: right[prompt] / count for prompt, count in sorted(asked.items())}


def distinct(prompts: Sequence[str], answers: Sequence[Answer]) -> tuple[list[Answer], int, int]:
    """Right answers without those that say to the same prompt what an earlier one said.

    Returns:
        the answers that are left; how many were equal to the letter; how many only after `normalised`.
    """
    letters, meanings = set[tuple[str, str]](), set[tuple[str, str]]()
    left, exact, same = [], 0, 0
    for answer in answers:
        if not answer.right:
            continue
        as_given = prompts[answer.prompt], answer.text
        meaning = normalised(as_given[0]), normalised(as_given[1])
        if as_given in letters:
            exact += 1
        elif meaning in meanings:
            same += 1
        else:
            left.append(answer)
        letters.add(as_given)
        meanings.add(meaning)
    return left, exact, same


def bin_limits(sizes: Sequence[int], max_share: float) -> list[int]:
    """How much of each bin may be kept so that none gives more than `max_share` of the sum; where the bins that are not
    empty are too few for that, all give as much as the smallest.
    """
    filled = [size for size in sizes if size]
    if not filled:
        return list(sizes)
    share, limit = max(max_share, 1 / len(filled)), max(filled)
    while (allowed := max(int(share * sum(min(size, limit) for size in filled) + 1e-9), min(filled))) < limit:
        limit = allowed
    return [min(size, limit) for size in sizes]


def _some(answers: list[Answer], count: int, seed: str) -> list[Answer]:
    return answers if len(answers) <= count else random.Random(f"selection-{seed}").sample(answers, count)
