"""Needles in a haystack, as in RULER (arXiv:2404.06654): numbers hidden in a text of given length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

_SENTENCES = (
    "The river runs past the mill and on towards the hills.",
    "In the morning the market fills with people and carts.",
    "A lamp was left burning in the window of the old house.",
    "He wrote three letters that week and sent none of them.",
    "The train was late again, and nobody seemed to mind.",
    "Rain came in from the west and stayed until the evening.",
    "She counted the steps to the tower and forgot the number.",
    "The gardener waters the beans before the sun is high.",
)
_THINGS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "indigo", "juniper", "kelp", "lotus")
_QUESTION = "What are the special magic numbers for {keys} mentioned in the text? Answer with the numbers."
MARGIN = 64  # tokens for the chat layout and for what the tokenizer makes of seams


def records(
    tokenizer: Any,
    lengths: list[int],
    num_needles: int = 1,
    num_records: int = 100,
    answer_tokens: int = 64,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Prompts that take, with an answer of `answer_tokens`, just under each of `lengths` tokens; `num_records` each.

    Yields:
        `length`, `text` (the haystack), `question` and `answers`.
    """
    cost = {text: len(tokenizer(" " + text)["input_ids"]) for text in _SENTENCES}
    for length in lengths:
        for number in range(num_records):
            rng = random.Random(f"{seed} {length} {number}")
            keys = rng.sample(_THINGS, num_needles)
            values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
            needles = [f"One of the special magic numbers for {k} is: {v}." for k, v in zip(keys, values, strict=True)]
            question = _QUESTION.format(keys=", ".join(keys))
            used = sum(len(tokenizer(" " + text)["input_ids"]) for text in (*needles, question))
            room = length - answer_tokens - MARGIN - used
            if room < 0:
                raise ValueError(f"a haystack of {length} tokens has no room for {num_needles} needles; make it longer")
            hay: list[str] = []
            while (sentence := rng.choice(_SENTENCES)) and cost[sentence] <= room:
                hay.append(sentence)
                room -= cost[sentence]
            for needle in needles:
                hay.insert(rng.randrange(len(hay) + 1), needle)
            yield {"length": length, "text": " ".join(hay), "question": question, "answers": values}
