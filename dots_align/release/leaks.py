"""What must not leave with a checkpoint: credentials, and paths that name a person's machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from gguf import GGUFReader, GGUFValueType

# Each with a boundary in front and long enough that a vocabulary's entries, which are quoted one by one, do not match.
PATTERNS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"[a-z][a-z0-9+.-]*://[^/\s:@\"']+:[^/\s@\"']+@",
    "a token in a setting": r"(?i)(?:api[_-]?key|access[_-]?token|auth[_-]?token|secret|passwd|password)[\"']?"
    r"\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{16,}",
    "a personal path": r"(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})[A-Za-z0-9._-]+[/\\]",
    "a path of the superuser": r"(?<![A-Za-z0-9._-])/root/[A-Za-z0-9._-]+",
    "a temporary path": r"(?<![A-Za-z0-9._-])/(?:tmp|var/folders)/[A-Za-z0-9._-]+",
}
_COMPILED = {what: re.compile(pattern) for what, pattern in PATTERNS.items()}


def find_leaks(directory: Path) -> list[str]:
    """One line for each finding: the file, what it is, and its beginning. Weights are searched in their headers."""
    home = str(Path.home())
    found = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = str(path.relative_to(directory))
        for text in _texts(path):
            found += [f"{name}: {what}: {_shown(match[0])}" for what, match in _matches(text)]
            if len(home) > len("/root") and home in text:
                found.append(f"{name}: the home directory of this machine")
    return list(dict.fromkeys(found))


def _matches(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    for what, pattern in _COMPILED.items():
        if (match := pattern.search(text)) is not None:
            yield what, match


def _shown(text: str) -> str:
    """Enough to find it, not enough to use it."""
    return f"{text[:12]}..." if len(text) > 12 else text


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".safetensors":
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        yield json.dumps(header.get("__metadata__") or {})
    elif path.suffix == ".gguf":
        for field in GGUFReader(path).fields.values():
            if field.types and field.types[-1] == GGUFValueType.STRING and len(field.types) == 1:
                yield str(field.contents())
    else:
        yield path.read_bytes().decode("utf-8", errors="replace")
