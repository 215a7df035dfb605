"""What `dots-align parity` does."""

from __future__ import annotations

import json
from pathlib import Path

from dots_align.parity.check import Sources, parity
from dots_align.parity.table import as_text


def run(checkpoint: Path, prompts: Path | None, sources: Sources, as_json: bool) -> bool:
    """Prints the table and the verdict, or JSON; whether there is parity."""
    found = parity(checkpoint, prompts, sources)
    print(json.dumps(found.as_dict(), indent=2) if as_json else as_text(found))
    return found.ok
