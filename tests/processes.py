"""What became of processes that a test, or what it tests, has started."""

from __future__ import annotations

import time
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether it runs: one that nobody has asked for its exit status yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    """It has been killed, which takes effect when it is its turn."""
    until = time.monotonic() + 300
    while (alive := is_alive(pid)) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive
