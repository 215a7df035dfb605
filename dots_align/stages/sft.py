"""Supervised fine-tuning on conversations."""

from __future__ import annotations

from pathlib import Path

from dots_align.config import SftRecipe
from dots_align.data.sources import load_conversations
from dots_align.run_directory import open_run_directory
from dots_align.runtime import seed_everything
from dots_align.stages.conversations import train_on


def run(recipe: SftRecipe) -> Path:
    """Trains and returns the last checkpoint's directory."""
    conversations = load_conversations(recipe.data, recipe.seed)
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    return train_on(conversations, recipe, run_dir)
