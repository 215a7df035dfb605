"""The recipe of a run, for the processes that verl starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dots_align.config import RECIPES


def recipe_of(record: str | Path) -> Any:
    """The recipe in a run's `run.json`."""
    values = json.loads(Path(record).read_text(encoding="utf-8"))["recipe"]
    return RECIPES[values["stage"]].model_validate(values)
