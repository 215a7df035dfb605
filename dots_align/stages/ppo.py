"""PPO: a critic, trained beside the policy, says what each state of an answer is worth."""

from __future__ import annotations

from pathlib import Path

from dots_align.config import PpoRecipe
from dots_align.stages import loop


def run(recipe: PpoRecipe) -> Path:
    """Trains and returns the last checkpoint's directory; the critic lies in it as `critic/`."""
    return loop.run(recipe)
