"""Tolerant reading of what a run left on disk: it may still be going, or was killed in the middle of a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_TEXT_CHARS = (
    20_000  # per prompt or response on the page; a 32k-token answer times 500 samples would be unreadable and slow
)


def read_json(path: Path, label: str, notices: list[str]) -> dict[str, Any]:
    """The object in a JSON file; `{}` where there is no file, or (with a notice) where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, OSError) as error:
        notices.append(f"{label} cannot be read ({error}); left out.")
        return {}
    if isinstance(value, dict):
        return value
    notices.append(f"{label} does not hold a JSON object; left out.")
    return {}


def read_lines(path: Path, label: str, notices: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one at a time.

    A last line without its newline is what a killed process leaves: dropped silently if it is no object.
    Any other line that is no object with an integer `step` is counted and becomes one notice for the file.
    """
    if not path.is_file():
        return
    broken: list[int] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            record = _parse(raw)
            if record is not None:
                yield record
            elif raw.endswith(b"\n"):
                broken.append(number)
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        what = "1 line that is" if len(broken) == 1 else f"{len(broken)} lines that are"
        notices.append(f"{label}: left out {what} not a JSON object with a whole-number step (line {lines}).")


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw.decode("utf-8", errors="replace"))
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    step = as_number(record.get("step"))
    if step is None or step != int(step):
        return None
    record["step"] = int(step)
    return record


def as_number(value: Any) -> float | None:
    """The finite number `value` is, or None: NaN and infinities have no place in JSON, nor on an axis."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= 1.7e308 else None


def as_text(value: Any) -> str:
    """`value` as page text; structured prompts (lists of messages) become JSON, endless answers are cut and say so."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]}… ({len(text) - MAX_TEXT_CHARS:,} more characters)"


def embeddable(value: Any) -> Any:
    """`value` (parsed JSON) with non-finite numbers spelled out, so that strict JSON can carry it."""
    if isinstance(value, dict):
        return {str(key): embeddable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [embeddable(item) for item in value]
    if isinstance(value, float) and as_number(value) is None:
        return str(value)
    return value


def checkpoint_step(name: str) -> int | None:
    """40 for `checkpoint-40`, None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None
