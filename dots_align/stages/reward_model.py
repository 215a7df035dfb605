"""A reward model from preferences: TRL's RewardTrainer (Bradley-Terry) on a dots1 whose head gives one number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig

from dots_align.config import RewardModelRecipe
from dots_align.data.chat import encode_conversation
from dots_align.data.sources import data_hash, load_preference_pairs
from dots_align.run_directory import open_run_directory
from dots_align.runtime import device, logger, seed_everything
from dots_align.stages.losses import LeanRewardTrainer
from dots_align.stages.trainer import prepare_model, train_and_publish, trainer_arguments
from dots_align.types import Message, PreferencePair


def run(recipe: RewardModelRecipe) -> Path:
    """Trains and returns the last checkpoint's directory."""
    pairs = load_preference_pairs(recipe.data, recipe.seed)
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    model, tokenizer = prepare_model(recipe, run_dir)
    arguments = RewardConfig(
        **trainer_arguments(recipe, run_dir, device().type == "cuda"),
        center_rewards_coefficient=recipe.center_rewards_coefficient,
        disable_dropout=False,  # lora.lora_dropout is the recipe's to say, dots1 has none of its own
    )
    return train_and_publish(
        LeanRewardTrainer,
        recipe,
        run_dir,
        model,
        data_hash(pairs),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(encode_pairs(tokenizer, pairs, recipe.train.max_length)),
    )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], max_length: int
) -> list[dict[str, Any]]:
    """Rows `{chosen_ids, rejected_ids}` (TRL's names): prompt, answer and end of turn. A pair of which one side is
    longer than `max_length` is left out, because an answer without its end is not the one that was judged.

    Raises:
        ValueError: no pair is left.
    """
    rows = []
    for pair in pairs:
        chosen, rejected = (
            encode_conversation(tokenizer, [*pair.prompt, Message("assistant", text)]).input_ids
            for text in (pair.chosen, pair.rejected)
        )
        if max(len(chosen), len(rejected)) <= max_length:
            rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    if not rows:
        raise ValueError(
            f"all {len(pairs)} pairs are longer than train.max_length={max_length} tokens, none is left to learn from; "
            "raise train.max_length"
        )
    if len(rows) < len(pairs):
        left_out = len(pairs) - len(rows)
        logger.warning(
            "%d of %d pairs are longer than train.max_length=%d and left out", left_out, len(pairs), max_length
        )
    return rows
