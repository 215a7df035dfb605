"""From a path in a recipe to validated records. Every complaint names the file, the line, and what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dots_align.config import DataSection
from dots_align.data import synthetic
from dots_align.types import ROLES, Conversation, Message, PreferencePair, Prompt

DEFAULT_SYNTHETIC_SAMPLES = 2000
GZIP = b"\x1f\x8b"
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
Record = TypeVar("Record", Conversation, PreferencePair, Prompt)


def load_conversations(data: DataSection, seed: int) -> list[Conversation]:
    """SFT records: `messages_field`, or `prompt_field` and `response_field`."""
    if data.path.startswith("synthetic:"):
        count, seed = _synthetic(data, "sft", seed)
        return [replace(r, messages=_with_system(r.messages, data)) for r in synthetic.sft_conversations(count, seed)]
    return _read(data, lambda row, source: _conversation(row, source, data))


def load_preference_pairs(data: DataSection, seed: int) -> list[PreferencePair]:
    """DPO and reward-model records: a prompt with `chosen_field` and `rejected_field`."""
    if data.path.startswith("synthetic:"):
        heldout = data.path == "synthetic:heldout_preference"
        count, seed = _synthetic(data, "heldout_preference" if heldout else "preference", seed)
        pairs = synthetic.preference_pairs(count, seed, heldout)
        return [replace(r, prompt=_with_system(r.prompt, data)) for r in pairs]
    return _read(data, lambda row, source: _preference_pair(row, source, data))


def load_prompts(data: DataSection, seed: int, need_answer: bool = True) -> list[Prompt]:
    """RL and evaluation records: a prompt and its reference answer, which may be left out where nobody scores."""
    if data.path.startswith("synthetic:"):
        heldout = data.path == "synthetic:heldout"
        count, seed = _synthetic(data, "heldout" if heldout else "prompts", seed)
        return [replace(r, messages=_with_system(r.messages, data)) for r in synthetic.prompts(count, seed, heldout)]
    return _read(data, lambda row, source: _prompt(row, source, data, need_answer))


def data_hash(records: list[Any]) -> str:
    """SHA-256 over the content of the records, in order: what a checkpoint's manifest names as its data."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode())
    return digest.hexdigest()


def _synthetic(data: DataSection, kind: str, seed: int) -> tuple[int, int]:
    found = data.path.removeprefix("synthetic:")
    if found != kind:
        wanted = "synthetic:prompts or synthetic:heldout" if kind == "prompts" else f"synthetic:{kind}"
        raise ValueError(f"data.path={data.path}: this stage takes {wanted}, or a JSONL or Parquet file")
    return data.max_samples or DEFAULT_SYNTHETIC_SAMPLES, seed if data.seed is None else data.seed


def _with_system(messages: list[Message], data: DataSection) -> list[Message]:
    """The messages with the recipe's system prompt in front, unless they bring their own."""
    if data.system_prompt is None or messages[0].role == "system":
        return messages
    return [Message("system", data.system_prompt), *messages]


def _read(data: DataSection, parse: Callable[[dict[str, Any], str], Record]) -> list[Record]:
    path = Path(data.path)
    if not path.is_file():
        raise ValueError(f"data.path={path}: {_no_file(path)}")
    records = []
    for source, row in rows_of(path):
        records.append(parse(row, source))
        if data.max_samples is not None and len(records) == data.max_samples:
            break
    if not records:
        raise ValueError(f"{path}: the data set is empty; it needs at least one record")
    return records


def _no_file(path: Path) -> str:
    if path.is_dir():
        return "this is a directory; give a JSONL or Parquet file in it"
    told = "no such file; give a JSONL or Parquet file, or synthetic:…"
    if len(path.parts) == 2 and not path.suffix:
        told += f". Nothing is fetched by name: hf download --repo-type dataset {path} brings the files of a data set"
    return told


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:line`, record) of a JSONL or Parquet file, whatever its fields.

    Raises:
        ValueError: no such file, or a line that is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a JSONL or Parquet file")
    yield from _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            if number == 1 and line.startswith((b"[", GZIP)):
                raise ValueError(f"{path}: {_other_form(line)}")
            row = _json_line(line, source)
            if not isinstance(row, dict):
                raise ValueError(f"{source}: expected a JSON object, found {type(row).__name__}")
            yield source, row


def _other_form(line: bytes) -> str:
    if line.startswith(GZIP):
        return "this file is compressed; gunzip it"
    return "this is a JSON array, not a record a line; jq -c '.[]' makes one of the other"


def _json_line(line: bytes, source: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        told = f"broken JSON at column {error.colno} ({error.msg})"
    except RecursionError:
        told = "too deeply nested"
    except ValueError as error:  # an integer of thousands of digits
        told = f"cannot be read ({error})"
    raise ValueError(f"{source}: {told}; fix or remove this line")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", row


def _text(row: dict[str, Any], field: str, source: str, key: str) -> str:
    if field not in row:
        have = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(f"{source}: no field {field!r} (the record has {have}); set data.{key} to the right name")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{source}: field {field!r} must be text, found {type(value).__name__}")
    _check_unicode(value, f"{source}: field {field!r}")
    if not value.strip():
        raise ValueError(f"{source}: field {field!r} is empty; fill it in or remove this record")
    return value


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, no valid Unicode; mend or remove it") from None


def _messages(value: Any, field: str, source: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{source}: field {field!r} must be a non-empty list of messages")
    messages = []
    for index, item in enumerate(value):
        where = f"{source}: {field}[{index}]"
        if not isinstance(item, dict):
            raise ValueError(f"{where} must be an object with `role` and `content`, found {type(item).__name__}")
        role, content = _role_and_content(item)
        if role is None:
            raise ValueError(f"{where} has no `role`; give one of {', '.join(ROLES)}")
        if role not in ROLES:
            raise ValueError(f"{where} has the unknown role {role!r}; give one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            found = "nothing" if content is None else type(content).__name__
            raise ValueError(f"{where}: `content` must be text, found {found}")
        _check_unicode(content, f"{where}.content")
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where} is an empty answer; fill it in or remove this record")
        if role == "system" and index > 0:
            raise ValueError(f"{where}: a system message may only come first")
        messages.append(Message(role, content))
    return messages


def _role_and_content(item: dict[str, Any]) -> tuple[Any, Any]:
    """Of a message in OpenAI's form, or in ShareGPT's (`from`, `value`)."""
    if "role" in item or "from" not in item:
        return item.get("role"), item.get("content")
    speaker = item["from"]
    return SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, item.get("value")


def _prompt_messages(row: dict[str, Any], source: str, data: DataSection) -> list[Message]:
    """The prompt of a record: a conversation that ends with the user's turn, or a text field."""
    if data.messages_field in row:
        messages = _messages(row[data.messages_field], data.messages_field, source)
        if messages[-1].role == "assistant":
            messages = messages[:-1]
    elif isinstance(row.get(data.prompt_field), list):
        messages = _messages(row[data.prompt_field], data.prompt_field, source)
    else:
        messages = [Message("user", _text(row, data.prompt_field, source, "prompt_field"))]
    if not messages or messages[-1].role != "user":
        raise ValueError(f"{source}: a prompt must end with a user message")
    return _with_system(messages, data)


def _answer(row: dict[str, Any], field: str, source: str, key: str) -> list[Message]:
    """A field that holds an answer: text, or (as in TRL's conversational sets) a list ending with the assistant's
    message.
    """
    if not isinstance(row.get(field), list):
        return [Message("assistant", _text(row, field, source, key))]
    messages = _messages(row[field], field, source)
    if messages[-1].role != "assistant":
        raise ValueError(f"{source}: {field!r} must end with an assistant message")
    return messages


def _conversation(row: dict[str, Any], source: str, data: DataSection) -> Conversation:
    fields = data.messages_field, data.prompt_field, data.response_field
    if not any(field in row for field in fields):
        have = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(
            f"{source}: neither {fields[0]!r} nor {fields[1]!r} and {fields[2]!r} (the record has {have}); set "
            "data.messages_field to what holds a conversation, or data.prompt_field and data.response_field"
        )
    if data.messages_field in row:
        messages = _with_system(_messages(row[data.messages_field], data.messages_field, source), data)
    else:
        answer = _answer(row, data.response_field, source, "response_field")
        messages = [*_prompt_messages(row, source, data), *answer]
    if not any(m.role == "assistant" for m in messages):
        raise ValueError(f"{source}: no assistant message, so there is nothing to learn; add one or remove this record")
    return Conversation(messages, source)


def _preference_pair(row: dict[str, Any], source: str, data: DataSection) -> PreferencePair:
    chosen = _answer(row, data.chosen_field, source, "chosen_field")
    rejected = _answer(row, data.rejected_field, source, "rejected_field")
    prompt = _prompt_of_pair(row, source, data, chosen[:-1], rejected[:-1])
    if chosen[-1] == rejected[-1]:
        raise ValueError(f"{source}: chosen and rejected are the same text; remove this record")
    return PreferencePair(prompt, chosen[-1].content, rejected[-1].content, source)


def _prompt_of_pair(
    row: dict[str, Any], source: str, data: DataSection, before: list[Message], before_rejected: list[Message]
) -> list[Message]:
    """The record's prompt; or what comes `before` the answers in their own lists, which then is all of the
    conversation.
    """
    names = f"{data.chosen_field!r} and {data.rejected_field!r}"
    if before != before_rejected:
        raise ValueError(f"{source}: {names} differ before their last message; they have to answer the same prompt")
    if not before:
        return _prompt_messages(row, source, data)
    given = row.get(data.prompt_field)
    if isinstance(given, list):
        messages = _messages(given, data.prompt_field, source)
        if before[: len(messages)] != messages:
            raise ValueError(
                f"{source}: {names} do not begin with the messages of {data.prompt_field!r}; leave the prompt out of "
                "them, or make it the same"
            )
    if before[-1].role != "user":
        raise ValueError(f"{source}: a prompt must end with a user message")
    return _with_system(before, data)


def _prompt(row: dict[str, Any], source: str, data: DataSection, need_answer: bool) -> Prompt:
    return Prompt(_prompt_messages(row, source, data), _reference_answer(row, source, data, need_answer), source)


def _reference_answer(row: dict[str, Any], source: str, data: DataSection, needed: bool) -> str | None:
    asked = data.answer_field
    fields = (asked,) if isinstance(asked, str) else asked
    for field in fields:
        if row.get(field) is None:
            if not needed:
                return None
            have = ", ".join(map(repr, row))
            raise ValueError(
                f"{source}: no field {field!r} (the record has {have}); set data.answer_field to the right name"
            )
    answer = row[asked] if isinstance(asked, str) else {field: row[field] for field in fields}
    return json.dumps(answer, ensure_ascii=False) if isinstance(answer, list | dict) else str(answer)
