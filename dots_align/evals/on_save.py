"""On-save hooks: what a recipe names under `on_save:` runs on every published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dots_align.checkpoint import Hook, load_trainable
from dots_align.config import EvaluationSection, ModelSection, ParallelSection
from dots_align.evals.suite import evaluate
from dots_align.runtime import is_main_process, logger, write_json
from dots_align.scoring import load_function


def resolve_hooks(recipe: Any) -> list[tuple[str, Hook]]:
    """The hooks a recipe names, in order. Raises ValueError for a name that leads nowhere, before anything is
    trained.
    """
    if recipe.evaluation is not None:
        load_function(recipe.evaluation.scorer, "evaluation.scorer")
    return [
        (name, evaluate_checkpoint if name == "evaluate" else load_function(name, "on_save")) for name in recipe.on_save
    ]


def evaluate_checkpoint(checkpoint: Path, recipe: Any) -> dict[str, float]:
    """The `evaluate` hook: writes `eval.json` beside the weights and returns its metrics as `eval/<name>`. It runs on
    every process, on a copy of the model that is spread over them as the one that trains.
    """
    output = checkpoint / "eval.json"
    return evaluate_directory(
        checkpoint, recipe.model, recipe.evaluation, recipe.seed, output, recipe.parallel, recipe.train.bf16
    )


evaluate_checkpoint.everywhere = True  # pyright: ignore[reportFunctionMemberAccess]


def evaluate_directory(
    checkpoint: Path,
    model: ModelSection,
    evaluation: EvaluationSection,
    seed: int,
    output: Path,
    parallel: ParallelSection | None = None,
    bf16: bool = False,
) -> dict[str, float]:
    """Loads a checkpoint directory, evaluates it and writes the result to `output`."""
    section = model.model_copy(update={"path": str(checkpoint), "preset": None})
    loaded, tokenizer = load_trainable(section, parallel or ParallelSection(), bf16)
    result = evaluate(loaded, tokenizer, evaluation, seed)
    if is_main_process():
        write_json(output, result)
    metrics = result["metrics"]
    logger.info(
        "%s: exact match %.1f %%, stop rate %.1f %%, mean length %.1f tokens (%d prompts)",
        checkpoint,
        100 * metrics["exact_match"],
        100 * metrics["stop_rate"],
        metrics["mean_length"],
        result["num_prompts"],
    )
    return {f"eval/{name}": value for name, value in metrics.items()}
