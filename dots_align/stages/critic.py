"""The critic of PPO, from and to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dots_align.checkpoint import model_directories
from dots_align.config import ModelSection, ParallelSection
from dots_align.model.dots1 import materialize, meta_model
from dots_align.model.expert_parallel import reshard, shard_model
from dots_align.model.heads import VALUE_HEAD, attach_value_head, has_value_head
from dots_align.model.sharded_io import HubFiles, load_weights, own_part, save_weights
from dots_align.runtime import device, is_main_process, on_main, start_processes, world_size

CRITIC = "critic"
"""Its directory, beside the policy in a checkpoint."""


def load_critic(model: ModelSection, parallel: ParallelSection, bf16: bool) -> Any:
    """The critic of PPO on its device, whole or this rank's part of it: a checkpoint's backbone under a value head.

    The head is the checkpoint's if that is a critic's; else it starts at 0, and so do all values.

    Raises:
        ValueError: as `load_trainable`.
    """
    directory, base = model_directories(model)
    if base != directory:
        raise ValueError(
            f"{directory}: a critic starts from a full checkpoint, and this is an adapter; `dots-align export "
            f"{directory}` writes the merged one, give that as critic.path"
        )
    loaded = meta_model(directory, model.dtype, model.attn_implementation, model.experts_implementation)
    attach_value_head(loaded)
    if world_size() > 1 or bf16:
        start_processes(parallel.timeout_minutes)
        shard_model(loaded, parallel, torch.bfloat16 if bf16 else None, device().type)
    materialize(loaded, device())
    fresh = not has_value_head(HubFiles(directory).shape(VALUE_HEAD))
    load_weights(loaded, directory, leave_out=(VALUE_HEAD,) if fresh else ())
    if fresh:
        with torch.no_grad():
            own_part(loaded.lm_head.weight)[0].zero_()
    return loaded


def save_critic(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes a critic into `directory`, which is made: weights, config and tokenizer; collective."""
    on_main(directory.mkdir)
    reshard(model)
    save_weights(model, directory)
    if is_main_process():
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
