"""Training on conversations, which SFT and RFT share: TRL's SFTTrainer on our encoding, packed, loss on the assistant's
own tokens and their stop token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from dots_align.config import RftRecipe, SftRecipe
from dots_align.data.encoding import encode_conversations
from dots_align.data.packing import join_sessions, pack_conversations
from dots_align.data.sources import data_hash
from dots_align.runtime import device, logger
from dots_align.stages.losses import LeanSftTrainer
from dots_align.stages.trainer import prepare_model, train_and_publish, trainer_arguments
from dots_align.types import Conversation


def train_on(conversations: Sequence[Conversation], recipe: SftRecipe | RftRecipe, run_dir: Path) -> Path:
    """Trains the recipe's model and returns the last checkpoint's directory."""
    model, tokenizer = prepare_model(recipe, run_dir)
    train = recipe.train
    encoded, cut = encode_conversations(tokenizer, conversations, train.max_length)
    if cut:
        logger.warning(
            "%d of %d conversations were cut at train.max_length=%d tokens", cut, len(encoded), train.max_length
        )
    encoded = join_sessions(encoded, train.sessions_per_sample, train.max_length, recipe.seed)
    if train.packing:
        rows = pack_conversations(encoded, train.max_length, recipe.seed)
    else:
        rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]
    # Rows are cut and packed here, so TRL's own truncation and packing stay off; it flattens a batch of rows into
    # one sequence.
    own = {"max_length": None, "packing": False, "padding_free": train.packing}
    arguments = SFTConfig(**{**trainer_arguments(recipe, run_dir, device().type == "cuda"), **own})
    return train_and_publish(
        LeanSftTrainer,
        recipe,
        run_dir,
        model,
        data_hash(list(conversations)),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )
