"""On-save hooks: what a recipe names under `on_save:` is done with every published checkpoint."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from dots_align.checkpoint import check_whole, fingerprint, load_trainable
from dots_align.config import EvaluationSection, HookSection, ModelSection, ParallelSection, SuiteSection, recipe_dict
from dots_align.data.sources import load_preference_pairs, load_prompts
from dots_align.evals.benchmarks import Suite, run_suite
from dots_align.evals.hook_process import user_hook
from dots_align.evals.hooks import Hook, SaveHook
from dots_align.evals.preference import evaluate_pairs
from dots_align.evals.suite import METRICS, evaluate, held_out
from dots_align.runtime import is_main_process, logger, write_json
from dots_align.scoring import load_function
from dots_align.types import Prompt

EVALS = "evals"  # beside a checkpoint's eval.json: what tasks of the suite were answered
POLICIES = ("keep_best", "stop_early")  # done by the publisher, with what hooks have found


def resolve_hooks(recipe: Any) -> list[SaveHook]:
    """The hooks a recipe names, in order. Raises ValueError for a name that leads nowhere, and for data that cannot be
    read, before anything is trained.
    """
    if recipe.evaluation is not None and recipe.stage == "reward_model":
        held_out(load_preference_pairs, recipe.evaluation.data, recipe.evaluation.num_pairs, recipe.seed)
    elif recipe.evaluation is not None:
        check_evaluation(recipe.evaluation, recipe.seed)
    found: list[SaveHook] = []
    for section in recipe.on_save:
        if section.hook not in POLICIES:
            twins = sum(hook.section.hook == section.hook for hook in found)
            short = section.hook.rpartition(":")[2]
            taken = twins or any(hook.name == short for hook in found)
            name = f"{short}_{len(found) + 1}" if taken else short
            found.append(SaveHook(name, resolve_hook(section), section, everywhere=section.hook == "evaluate"))
    return found


def metrics_of(evaluation: EvaluationSection) -> list[str]:
    """Names of what an evaluation measures. Raises ValueError for a scorer or a task that does not exist."""
    load_function(evaluation.scorer, "evaluation.scorer")
    tasks = Suite(evaluation.tasks.names).tasks() if evaluation.tasks is not None else []
    return [*METRICS, *(f"{task.name}/{task.metric}" for task in tasks)]


def check_evaluation(evaluation: EvaluationSection, seed: int) -> list[Prompt]:
    """The prompts of an evaluation that can be done; no weight is needed to tell. Raises ValueError otherwise."""
    metrics_of(evaluation)
    return held_out(load_prompts, evaluation.data, evaluation.num_prompts, seed)


def resolve_hook(section: HookSection) -> Hook:
    """The function behind a hook, with its arguments filled in. Raises ValueError if it does not take them."""
    if section.hook == "evaluate":
        return evaluate_checkpoint
    if section.hook == "push":
        return functools.partial(push, to=str(section.to), hub=section.hub)
    return user_hook(section)


def evaluate_checkpoint(checkpoint: Path, recipe: Any) -> dict[str, float]:
    """The `evaluate` hook: writes `eval.json` beside the weights and returns its metrics as `eval/<name>`. In the
    trainer it runs on every process, on a copy of the model that is spread over them as the one that trains.
    """
    if recipe.stage == "reward_model":
        return _evaluate_reward_model(checkpoint, recipe)
    return evaluate_directory(
        checkpoint,
        recipe.model,
        recipe.evaluation,
        recipe.seed,
        checkpoint / "eval.json",
        recipe.parallel,
        recipe.train.bf16,
    )


def push(checkpoint: Path, recipe: Any, to: str, hub: bool) -> None:
    """The `push` hook: a whole copy in the folder `to`, as `<stage>-<checkpoint>`, or an upload to the hub's repository
    of that name, which is made, private, if there is none.
    """
    name = f"{recipe.stage}-{checkpoint.name}"
    if hub:
        from huggingface_hub import HfApi

        HfApi().create_repo(to, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=to, folder_path=checkpoint, path_in_repo=name, commit_message=name)
        return
    target = Path(to) / name
    staging = target.with_name(f".{name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(checkpoint, staging)
    check_whole(staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)


def _evaluate_reward_model(checkpoint: Path, recipe: Any) -> dict[str, float]:
    result = evaluate_pairs(checkpoint, recipe.evaluation, recipe.seed, recipe.parallel, recipe.train.bf16)
    if is_main_process():
        write_json(checkpoint / "eval.json", result)
    metrics = result["metrics"]
    logger.info(
        "%s: accuracy %.1f %%, mean margin %.2f (%d pairs)",
        checkpoint,
        100 * metrics["accuracy"],
        metrics["margin"],
        result["num_pairs"],
    )
    return {f"eval/{name}": value for name, value in metrics.items()}


def evaluate_directory(
    checkpoint: Path,
    model: ModelSection,
    evaluation: EvaluationSection,
    seed: int,
    output: Path,
    parallel: ParallelSection | None = None,
    bf16: bool = False,
) -> dict[str, float]:
    """Loads a checkpoint directory, full or adapter, evaluates it and writes the result to `output`."""
    section = model.model_copy(update={"path": str(checkpoint), "preset": None})
    loaded, tokenizer = load_trainable(section, parallel or ParallelSection(), bf16)
    result = {**evaluate(loaded, tokenizer, evaluation, seed), "key": evaluation_key(model, evaluation, seed)}
    if evaluation.tasks is not None:
        _add_tasks(result, loaded, tokenizer, evaluation.tasks, checkpoint, output)
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


def evaluation_key(model: ModelSection, evaluation: EvaluationSection, seed: int) -> str:
    """Tells evaluations of one checkpoint apart: 12 hexadecimal digits over what is asked, and in which dtype."""
    asked = recipe_dict(evaluation)
    del asked["num_samples_shown"]
    text = json.dumps([asked, seed, model.dtype], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _add_tasks(result: dict[str, Any], model: Any, tokenizer: Any, tasks: SuiteSection, checkpoint: Path, output: Path):
    suite = Suite(tasks.names, Path(tasks.data) if tasks.data else None, tasks.limit, tasks.hub)
    directory = output.parent if output.parent.name == EVALS else output.parent / EVALS
    found = run_suite(model, tokenizer, suite, fingerprint(checkpoint), directory)
    result["tasks"] = {name: task["metrics"] for name, task in found.items()}
    for name, task in found.items():
        result["metrics"][f"{name}/{task['metric']}"] = task["metrics"][task["metric"]]["value"]
