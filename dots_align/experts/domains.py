"""Domains: named files whose text goes through the model, as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dots_align.config import DataSection
from dots_align.data.chat import encode_conversation
from dots_align.data.sources import load_conversations, rows_of
from dots_align.types import Message


@dataclass(frozen=True)
class Domain:
    """`path` is a JSONL or Parquet file, or `synthetic:sft`; `fields` hold its text (none: found by their names)."""

    name: str
    path: str
    fields: tuple[str, ...] = ()


def parse_domain(text: str) -> Domain:
    """`[NAME=]FILE[:FIELD,FIELD]`, as on the command line; the name is the file's where none is given."""
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:
        name, rest = "", text
    path, colon, fields = rest.rpartition(":")
    if not colon or rest.startswith("synthetic:"):
        path, fields = rest, ""
    if not path:
        raise ValueError(f"--data {text}: no file; write NAME=FILE, or NAME=FILE:FIELD,FIELD")
    return Domain(name or Path(path.replace(":", "_")).stem, path, tuple(filter(None, fields.split(","))))


def parse_domains(texts: list[str]) -> list[Domain]:
    domains = [parse_domain(text) for text in texts]
    names = [domain.name for domain in domains]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--data: two domains are called {twice!r}; name them, as in {twice}_2=FILE")
    return domains


def token_ids(
    domain: Domain, tokenizer: PreTrainedTokenizerBase, max_tokens: int, max_length: int
) -> Iterator[list[int]]:
    """Sequences of at most `max_length` tokens, `max_tokens` in all; longer records are cut.

    Raises:
        ValueError: no such file, a record without text, or nothing in the file.
    """
    room = max_tokens
    for ids in _encoded(domain, tokenizer):
        ids = ids[: min(max_length, room)]
        if ids:
            yield ids
        room -= len(ids)
        if room <= 0:
            return
    if room == max_tokens:
        raise ValueError(f"{domain.path}: holds no text; a domain needs at least one record with tokens")


def _encoded(domain: Domain, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    if domain.path.startswith("synthetic:"):
        for conversation in load_conversations(DataSection(path=domain.path), seed=1):
            yield encode_conversation(tokenizer, conversation.messages).input_ids
        return
    for source, row in rows_of(Path(domain.path)):
        yield _record(row, domain.fields, source, tokenizer)


def _record(row: dict[str, Any], fields: tuple[str, ...], source: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Conversations in the tokenizer's template, anything else as plain text."""
    if fields:
        return _plain("\n".join(_text(row, field, source) for field in fields), tokenizer)
    if "messages" in row:
        try:
            messages = [Message(turn["role"], turn["content"]) for turn in row["messages"]]
        except (KeyError, TypeError):
            raise ValueError(f"{source}: 'messages' is not a list of {{role, content}}") from None
        return encode_conversation(tokenizer, messages).input_ids
    if "prompt" in row and "response" in row:
        turns = [Message("user", _text(row, "prompt", source)), Message("assistant", _text(row, "response", source))]
        return encode_conversation(tokenizer, turns).input_ids
    field = next((name for name in ("text", "prompt") if name in row), None)
    if field is None:
        have = ", ".join(row) or "nothing"
        raise ValueError(f"{source}: which fields are its text? It has {have}; write FILE:FIELD,FIELD")
    return _plain(_text(row, field, source), tokenizer)


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _text(row: dict[str, Any], field: str, source: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{source}: no text in field {field!r} (the record has {', '.join(row)})")
    return value
