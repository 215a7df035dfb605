"""GRPO and its family: an answer is worth what it is worth beside the others to the same prompt."""

from __future__ import annotations

from pathlib import Path

from dots_align.config import GrpoRecipe
from dots_align.stages import loop


def run(recipe: GrpoRecipe) -> Path:
    """Trains and returns the last checkpoint's directory."""
    return loop.run(recipe)
