"""`dots-align eval`: a recipe's evaluation, or tasks of the suite and of lm-evaluation-harness in one table."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from dots_align.checkpoint import (
    check_whole,
    encode_rollout_prompts,
    fingerprint,
    load_trainable,
    read_json,
    stored_dtype,
)
from dots_align.config import EvalRecipe, ModelSection, ParallelSection, apply_override
from dots_align.evals.benchmarks import Suite, run_suite, table
from dots_align.evals.on_save import EVALS, check_evaluation, evaluate_directory, evaluation_key
from dots_align.runtime import is_main_process, write_json

RESULTS = "results.json"


def run(options: Any) -> Path:
    """Asks a checkpoint what the command's options say, prints the table, and returns the file with all results.

    Raises:
        ValueError: a task that does not exist, data that is not there, or lm-evaluation-harness is not installed.
    """
    suite = suite_of(options)
    suite.tasks()  # what is wrong with a name is said before weights are loaded
    harness = tuple(filter(None, options.lm_eval.split(",")))
    if harness and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--lm-eval needs lm-evaluation-harness; pip install 'dots-align[lm-eval]'")
    check_whole(options.target)
    checkpoint = options.target.resolve()
    directory = options.output or checkpoint / EVALS
    make_writable(directory, "--output FOLDER")
    section = ModelSection(path=str(checkpoint), dtype=stored_dtype(checkpoint))  # pyright: ignore[reportArgumentType]
    model, tokenizer = load_trainable(section, ParallelSection(), bf16=False)
    known = fingerprint(checkpoint)
    found: dict[str, Any] = run_suite(model, tokenizer, suite, known, directory)
    if harness:
        from dots_align.evals.lm_eval import HarnessRequest, run_harness

        request = HarnessRequest(harness, options.lm_eval_tasks, options.chat, options.limit, options.shots)
        found |= run_harness(model, tokenizer, request, known, directory)
    if is_main_process():
        write_json(directory / RESULTS, {"checkpoint": str(checkpoint), "results": found})
        print(table(found))
    return directory / RESULTS


def run_recipe(recipe: EvalRecipe) -> Path:
    """Does what an eval recipe says with its checkpoint, and returns the file with the result.

    Raises:
        ValueError: it cannot be done; before weights are loaded where configuration, tokenizer and data tell.
    """
    checkpoint = Path(str(recipe.model.path))
    prompts = check_evaluation(recipe.evaluation, recipe.seed)
    encode_rollout_prompts(recipe.model, prompts, recipe.evaluation.max_tokens)
    output = result_file(checkpoint, recipe)
    evaluate_directory(checkpoint, recipe.model, recipe.evaluation, recipe.seed, output, recipe.parallel)
    return output


def result_file(checkpoint: Path, recipe: EvalRecipe) -> Path:
    """Where the result of an eval recipe goes: the checkpoint's `eval.json`, unless that is the result of another
    evaluation, such as the one it was saved with; then a file of its own under `evals/`. Its folder is made.

    Raises:
        ValueError: nothing can be written there, said before anything is asked.
    """
    own, key = checkpoint / "eval.json", evaluation_key(recipe.model, recipe.evaluation, recipe.seed)
    beside = own.is_file() and read_json(own).get("key") != key
    output = checkpoint / EVALS / f"eval-{key}.json" if beside else own
    if recipe.output:
        output = Path(recipe.output)
    make_writable(output.parent, "output=FILE")
    return output


def make_writable(directory: Path, remedy: str) -> None:
    """Makes a directory for results; raises ValueError if that, or writing there, is impossible."""
    with contextlib.suppress(OSError):  # what is wrong shows in what is there then
        directory.mkdir(parents=True, exist_ok=True)
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ValueError(f"{directory}: results cannot be written there; give {remedy}")


def suite_of(options: Any) -> Suite:
    """The tasks, and how they are asked, of the command's options; `key=value` are keys of `SamplingSection`."""
    changes: dict[str, Any] = {}
    for override in options.overrides:
        apply_override(changes, override, {})
    judge = (("base_url", options.judge), ("model", options.judge_model)) if options.judge else ()
    names = tuple(filter(None, options.tasks.split(",")))
    return Suite(names, options.data, options.limit, options.hub, options.shots, tuple(changes.items()), judge)
