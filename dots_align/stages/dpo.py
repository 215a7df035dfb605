"""Direct preference optimisation: TRL's DPOTrainer, reference log-probs computed once and kept with the run."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_from_disk
from trl import DPOConfig

from dots_align.config import DpoRecipe
from dots_align.data.chat import as_dicts, encode_conversation
from dots_align.data.sources import data_hash, load_preference_pairs
from dots_align.run_directory import open_run_directory
from dots_align.runtime import device, on_main, seed_everything
from dots_align.stages.losses import LeanDpoTrainer
from dots_align.stages.trainer import prepare_model, train_and_publish, trainer_arguments
from dots_align.types import Message, PreferencePair


def run(recipe: DpoRecipe) -> Path:
    """Trains and returns the last checkpoint's directory."""
    pairs = load_preference_pairs(recipe.data, recipe.seed)
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    model, tokenizer = prepare_model(recipe, run_dir)
    _check_lengths(tokenizer, pairs, recipe.train.max_length)
    arguments = DPOConfig(
        **trainer_arguments(recipe, run_dir, device().type == "cuda"),
        beta=recipe.beta,
        loss_type=list(recipe.loss_type),
        loss_weights=list(recipe.loss_weights) if recipe.loss_weights else None,
        precompute_ref_log_probs=True,
    )
    return train_and_publish(
        LeanDpoTrainer,
        recipe,
        run_dir,
        model,
        data_hash(pairs),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=_dataset(pairs, run_dir, data_hash(pairs)),
    )


def _dataset(pairs: list[PreferencePair], run_dir: Path, content: str) -> Dataset:
    """The pairs in TRL's conversational form, stored in the run so that TRL's cache of reference log-probs lies
    beside them.
    """
    directory = run_dir / "preference_pairs" / content[:16]
    on_main(lambda: _store(pairs, directory))
    dataset = load_from_disk(directory)
    assert isinstance(dataset, Dataset)
    return dataset


def _store(pairs: list[PreferencePair], directory: Path) -> None:
    if directory.is_dir():
        return
    rows = [
        {
            "prompt": as_dicts(pair.prompt),
            "chosen": as_dicts([Message("assistant", pair.chosen)]),
            "rejected": as_dicts([Message("assistant", pair.rejected)]),
        }
        for pair in pairs
    ]
    staging = directory.with_name(f".{directory.name}.staging")
    Dataset.from_list(rows).save_to_disk(staging)
    staging.rename(directory)


def _check_lengths(tokenizer, pairs: list[PreferencePair], max_length: int) -> None:
    """TRL would drop a pair whose prompt fills `max_length` without a word; here it is an error that names it."""
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            labels = encode_conversation(tokenizer, [*pair.prompt, Message("assistant", answer)]).labels
            if all(label == -100 for label in labels[:max_length]):
                raise ValueError(
                    f"{pair.source}: the prompt alone is longer than train.max_length={max_length} tokens, no answer "
                    "token is left; raise train.max_length or remove this record"
                )
