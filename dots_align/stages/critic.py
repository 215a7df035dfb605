"""The critic of PPO, from and to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dots_align.checkpoint import load_trainable
from dots_align.config import ModelSection, ParallelSection
from dots_align.model.expert_parallel import reshard
from dots_align.model.sharded_io import save_weights
from dots_align.runtime import is_main_process, on_main

CRITIC = "critic"
"""Its directory, beside the policy in a checkpoint."""


def load_critic(model: ModelSection, parallel: ParallelSection, bf16: bool) -> Any:
    """The critic of PPO on its device, whole or this rank's part of it: a checkpoint's backbone under a value head.

    The head is the checkpoint's if that is a critic's or a reward model's; else it starts at 0, and so do all values.

    Raises:
        ValueError: as `load_trainable`.
    """
    return load_trainable(model, parallel, bf16, scalar_head=True)[0]


def save_critic(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes a critic into `directory`, which is made: weights, config and tokenizer; collective."""
    on_main(directory.mkdir)
    reshard(model)
    save_weights(model, directory)
    if is_main_process():
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
