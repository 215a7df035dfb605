"""On-save hooks: what a recipe names under `on_save:` runs on every published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dots_align.checkpoint import Hook, load_model
from dots_align.config import EvaluationSection, ModelSection
from dots_align.evals.suite import evaluate
from dots_align.runtime import device, logger, write_json
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
    """The `evaluate` hook: writes `eval.json` beside the weights and returns its metrics as `eval/<name>`."""
    return evaluate_directory(checkpoint, recipe.model, recipe.evaluation, recipe.seed, checkpoint / "eval.json")


def evaluate_directory(
    checkpoint: Path, model: ModelSection, evaluation: EvaluationSection, seed: int, output: Path
) -> dict[str, float]:
    """Loads a checkpoint directory, evaluates it and writes the result to `output`."""
    loaded, tokenizer = load_model(model.model_copy(update={"path": str(checkpoint), "preset": None}), device())
    result = evaluate(loaded, tokenizer, evaluation, seed)
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
