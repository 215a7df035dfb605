"""The prompts of a parity check: fixed ones in Chinese and English, or those of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dots_align.data.chat import as_dicts, encode_prompt, stop_token_ids
from dots_align.export.verify import CONVERSATIONS
from dots_align.parity.observation import Asked, Question
from dots_align.types import ROLES, Message

# Read as they stand. The last is long enough for a wrong rotary base to move far positions.
TEXTS = (
    "def add(a, b):\n    return a + b  # 12345\n\n",
    "从前有座山，山里有座庙，庙里有个老和尚在讲故事。价格：３.50元。",
    "Line 1: Tom has 12 apples, it's 3.50 each.\n第二行：小明有32个苹果，又买了9个，现在有几个？\n" * 3,
)


def fixed_questions(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[Question, ...]:
    """Chats, texts, and ids spread over the vocabulary, with id 0 among them: some take that one for padding."""
    chats = [_chat(tokenizer, f"chat {n}", messages) for n, messages in enumerate(CONVERSATIONS, 1)]
    texts = [_text(tokenizer, f"text {n}", text) for n, text in enumerate(TEXTS, 1)]
    ids = (0, *((7919 * i + 13) % vocabulary for i in range(30)), 0, 0, 1)
    return (*chats, *texts, Question("ids", ids))


def read_questions(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Question, ...]:
    """The prompts of a JSONL file; a line has `messages`, `prompt` (what a user says) or `text` (read as it stands).

    Raises:
        ValueError: names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_read(f"line {number}", json.loads(line), tokenizer))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not a prompt: {error}") from None
    if not found:
        raise ValueError(f"{path}: holds no prompt; a line is a JSON object with messages, prompt or text")
    return tuple(found)


def _read(name: str, record: Any, tokenizer: PreTrainedTokenizerBase) -> Question:
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of a JSON object")
    if text := record.get("text"):
        return _text(tokenizer, name, str(text))
    raw = record.get("messages") or record.get("prompt")
    if not raw:
        raise ValueError("it has none of messages, prompt, text")
    turns = [{"role": "user", "content": raw}] if isinstance(raw, str) else raw
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    if unknown := [m.role for m in messages if m.role not in ROLES]:
        raise ValueError(f"role {unknown[0]!r} is none of {', '.join(ROLES)}")
    return _chat(tokenizer, name, messages)


def _chat(tokenizer: PreTrainedTokenizerBase, name: str, messages: tuple[Message, ...]) -> Question:
    return Question(name, tuple(encode_prompt(tokenizer, messages)), messages=messages)


def _text(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> Question:
    ids: Any = tokenizer(text)["input_ids"]
    return Question(name, tuple(ids), text=text)


def within_context(questions: tuple[Question, ...], context: int, named: bool) -> tuple[Question, ...]:
    """Those with room for a short answer; of prompts that somebody named none is left out.

    Raises:
        ValueError: one of those is too long.
    """
    fitting = tuple(q for q in questions if len(q.token_ids) + 8 <= context)
    if named and len(fitting) < len(questions):
        long = next(q for q in questions if q not in fitting)
        raise ValueError(f"prompt {long.name} has {len(long.token_ids)} tokens, the context is {context}; shorten it")
    return fitting


def asked(questions: tuple[Question, ...], tokenizer: PreTrainedTokenizerBase) -> Asked:
    return Asked(questions, end_of_turn(tokenizer), frozenset(stop_token_ids(tokenizer)))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token behind an answer, by the template and not by what some configuration says of it.

    Raises:
        ValueError: the template puts no token of its own there.
    """
    turns = as_dicts([Message("user", "1"), Message("assistant", "2")])
    rendered: Any = tokenizer.apply_chat_template(turns, return_dict=True)
    last = list(rendered["input_ids"])[-1]
    if last not in tokenizer.added_tokens_decoder:
        raise ValueError(f"the chat template ends an answer with token {last}, which is not one of the special tokens")
    return last
