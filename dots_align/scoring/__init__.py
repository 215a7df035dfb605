"""Calling the user's reward functions: found by name, run beside the trainer, failures logged and counted."""

from dots_align.scoring.functions import RewardFunction, load_function
from dots_align.scoring.rewards import RewardSum, Score, Scoring

__all__ = ["RewardFunction", "RewardSum", "Score", "Scoring", "load_function"]
