"""Samples on the page: all of a run's where they fit, else spread evenly over it; in columns, compressed, in chunks.

A browser unpacks a chunk at a time, so that a hundred thousand samples never block it. What tokens look like (texts,
log-probs, advantages) lies in chunks of its own, which are unpacked when somebody looks at one of their samples.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dots_align.report.reading import as_number, as_text

MAX_SAMPLES = 120_000  # per set
MAX_CHARS = 40_000_000  # of all texts of a set: about 8 MB of page
MAX_TOKENS = 600_000  # of a set whose texts, log-probs and advantages are kept: about 3 MB of page
CHUNK = 4_000
TOKENS = ("tokens", "logprobs", "advantages")


@dataclass
class Blobs:
    """Compressed pieces of the page, by name; base64 of gzip, which browsers unpack themselves."""

    content: dict[str, str] = field(default_factory=dict)

    def add(self, content: bytes) -> str:
        """Keeps `content` and returns the name it can be found by."""
        name = f"blob-{len(self.content)}"
        self.content[name] = base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")
        return name

    def add_json(self, value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # A lone surrogate in model output has no UTF-8; backslashreplace spells it as JSON does.
        return self.add(text.encode("utf-8", errors="backslashreplace"))


@dataclass
class SampleSet:
    """What the browser of samples can show at once.

    `total` counts those there were; `shown` are on the page, `detailed` of them with their tokens. `chunks` names, for
    each chunk, the blob of its columns and that of its tokens (or None).
    """

    label: str
    score: str
    about: str
    total: int
    shown: int
    detailed: int
    parts: list[str]
    chunks: list[tuple[str, str | None]]


class Thinned:
    """The records of a stream, in order, or an even choice of at most `limit` of them that ends with the latest.

    A record of an earlier step than the one before it is a resume: what it replaces is dropped.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.stride = limit, 1
        self.kept: list[tuple[int, dict[str, Any]]] = []  # with each one's place in the stream
        self.per_step: Counter[int] = Counter()
        self.latest: tuple[int, dict[str, Any]] | None = None
        self.place = 0

    @property
    def total(self) -> int:
        return sum(self.per_step.values())

    def add(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if self.latest is not None and step < self.latest[1]["step"]:
            self.kept = [item for item in self.kept if item[1]["step"] < step]
            self.per_step = Counter({at: count for at, count in self.per_step.items() if at < step})
        self.per_step[step] += 1
        self.latest = (self.place, record)
        if self.place % self.stride == 0:
            self.kept.append(self.latest)
        self.place += 1
        if len(self.kept) > self.limit:
            self.stride *= 2
            self.kept = [item for item in self.kept if item[0] % self.stride == 0]

    def records(self) -> list[dict[str, Any]]:
        ends = [] if self.latest is None or (self.kept and self.kept[-1] is self.latest) else [self.latest]
        return [record for _, record in self.kept + ends]


def read_samples(records: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """(the samples that are shown, oldest first; how many there are)."""
    thinned = Thinned(MAX_SAMPLES)
    for record in records:
        thinned.add(record)
    return thinned.records(), thinned.total


def pack_samples(
    blobs: Blobs, records: Sequence[dict[str, Any]], total: int, label: str, score: str = "reward", about: str = ""
) -> SampleSet:
    """Puts samples (as in samples.jsonl or eval.json) on the page, newest first.

    Args:
        score: the key of the number that a sample is judged by.
    """
    rows = _within(list(reversed(records)), [_size(record) for record in reversed(records)], MAX_CHARS)
    with_tokens = [index for index, row in enumerate(rows) if _tokens(row) is not None]
    sizes = [len(rows[index]["tokens"]) for index in with_tokens]
    detailed = set(_within(with_tokens, sizes, MAX_TOKENS))
    parts = list(dict.fromkeys(name for row in rows for name in _numbers(row.get("rewards"))))
    chunks: list[tuple[str, str | None]] = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        tokens = {i: _tokens(row) for i, row in enumerate(part) if start + i in detailed}
        chunks.append((blobs.add_json(_columns(part, parts, score)), blobs.add_json(tokens) if tokens else None))
    return SampleSet(label, score, about, total, len(rows), len(detailed), parts, chunks)


def _within(items: list[Any], sizes: list[int], limit: int) -> list[Any]:
    """All items, or every second, third, … so that their sizes add up to at most `limit`; the first is among them."""
    stride = 1
    while stride < len(items) and sum(sizes[::stride]) > limit:
        stride += 1
    return items[::stride]


def _size(record: dict[str, Any]) -> int:
    return sum(len(as_text(record.get(key))) for key in ("prompt", "response", "answer"))


def _columns(rows: list[dict[str, Any]], parts: list[str], score: str) -> dict[str, Any]:
    """One list a key; prompts that return, as they do for every group and epoch, are written once."""
    prompts: dict[str, int] = {}
    rewards = [_numbers(row.get("rewards")) for row in rows]
    return {
        "step": [as_number(row.get("step")) for row in rows],
        "prompt": [prompts.setdefault(as_text(row.get("prompt")), len(prompts)) for row in rows],
        "prompts": list(prompts),
        **{key: [as_text(row.get(key)) for row in rows] for key in ("response", "answer", "finish_reason")},
        "reward": [as_number(row.get(score)) for row in rows],
        "length": [len(tokens) if isinstance(tokens := row.get("tokens"), list) else None for row in rows],
        "parts": [[values.get(name) for values in rewards] for name in parts],
    }


def _tokens(row: dict[str, Any]) -> list[list[Any]] | None:
    """[texts, log-probs, advantages] of a sample whose lists fit each other; None of any other."""
    tokens, logprobs, advantages = (row.get(name) for name in TOKENS)
    if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs) or not tokens:
        return None
    advantages = advantages if isinstance(advantages, list) and len(advantages) in (1, len(tokens)) else []
    return [[str(token) for token in tokens], [_short(value) for value in logprobs], [_short(a) for a in advantages]]


def _short(value: Any) -> float | None:
    number = as_number(value)
    return None if number is None else round(number, 3)


def _numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping by name; empty for anything else."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(name): number for name, item in items if (number := as_number(item)) is not None}
