"""Supervised fine-tuning: TRL's SFTTrainer on our encoding, packed, loss on the assistant's own tokens and their
stop token.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from dots_align.config import SftRecipe
from dots_align.data.encoding import encode_conversations
from dots_align.data.packing import pack_conversations
from dots_align.data.sources import data_hash, load_conversations
from dots_align.runtime import device, logger, open_run_directory, seed_everything
from dots_align.stages.losses import LeanSftTrainer
from dots_align.stages.trainer import prepare_model, train_and_publish, trainer_arguments


def run(recipe: SftRecipe) -> Path:
    """Trains and returns the last checkpoint's directory."""
    conversations = load_conversations(recipe.data, recipe.seed)
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    model, tokenizer = prepare_model(recipe, run_dir)
    encoded, cut = encode_conversations(tokenizer, conversations, recipe.train.max_length)
    if cut:
        logger.warning(
            "%d of %d conversations were cut at train.max_length=%d tokens", cut, len(encoded), recipe.train.max_length
        )
    if recipe.train.packing:
        rows = pack_conversations(encoded, recipe.train.max_length, recipe.seed)
    else:
        rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]
    # Rows are cut and packed here, so TRL's own truncation and packing stay off; it flattens a batch of rows into
    # one sequence.
    own = {"max_length": None, "packing": False, "padding_free": recipe.train.packing}
    arguments = SFTConfig(**{**trainer_arguments(recipe, run_dir, device().type == "cuda"), **own})
    return train_and_publish(
        LeanSftTrainer,
        recipe,
        run_dir,
        model,
        data_hash(conversations),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )
