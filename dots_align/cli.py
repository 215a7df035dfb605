"""The command line: one sub-command per stage or tool. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dots_align import __version__
from dots_align.config import load_recipe
from dots_align.generation.options import generation_keys, load_options

STAGES = {
    "sft": "supervised fine-tuning on conversations",
    "dpo": "direct preference optimisation",
    "rft": "rejection-sampling fine-tuning: SFT on the model's own right answers",
    "reward_model": "a reward model from preferences",
    "grpo": "reinforcement learning from verifiable rewards, by comparing answers",
    "ppo": "the same with a critic",
    "pipeline": "stages in order, then export and report",
}
DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOSPC),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
)
"""What a person can mend, and no mistake of ours."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, runs, and turns what people can mend into one line on stderr and exit status 1."""
    options = _parse(arguments)
    # transformers and datasets look for newer files on the hub unless told not to; downloads happen only when asked
    # for.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.run(options)
    except KeyboardInterrupt:
        if options.command in (*STAGES, "generate") and int(os.environ.get("RANK", 0)) == 0:
            told = "stopped; the same command goes on from what is finished"
            print(f"dots-align {options.command}: {told}", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        if os.environ.get("DOTS_ALIGN_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            sys.exit(f"dots-align {options.command}: {error}")
        _end_other_rank(error)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            if (told := _disk_trouble(error)) and not os.environ.get("DOTS_ALIGN_TRACEBACK"):
                sys.exit(f"dots-align {options.command}: {told}")
            raise
        traceback.print_exc()
        _end_other_rank(error)


def _disk_trouble(error: Exception) -> str | None:
    """What a disk had against it, if it was one that ended the command. A full one is told in words alone by those who
    write through libraries that are not Python.
    """
    if isinstance(error, OSError) and error.errno in DISK:
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    else:
        told = next((os.strerror(number) for number in FULL if os.strerror(number) in str(error)), "")
    if any(os.strerror(number) in told for number in FULL):
        told += "; make room, and give the same command again: whatever has its final name is whole"
    return told or None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was given; `key=value` may stand behind options too, where argparse alone would not take it."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    takes_keys = hasattr(options, "overrides")
    for word in rest:
        if takes_keys and word.startswith("--") and {".", "="} & set(word):
            key = word.lstrip("-").partition("=")[0]
            parser.error(f"{word}: a key of a recipe is given without dashes, {key}=…")
        if not takes_keys or word.startswith("-") or "=" not in word:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _end_other_rank(error: Exception) -> NoReturn:
    """Ends one of several processes, which may be waiting for each other."""
    from dots_align.runtime import die

    if isinstance(error, ValueError):
        time.sleep(5)  # the main process most likely says the same, and the launcher then ends this one
    die(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dots-align", description="Post-training and RL for dots.llm1-class mixture-of-experts models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        added.set_defaults(run=run)
        return added

    for name, summary in STAGES.items():
        stage = command(name, summary, _stage)
        stage.add_argument("recipe", type=Path, help="YAML file; the ones that come with the project are in recipes/")
        _add_keys(stage, "for example optim.learning_rate=1e-5")
    _add_eval(command("eval", "evaluate one checkpoint, by a recipe or on tasks of the suite", _eval))
    plan = command("plan", "will a recipe fit, how fast will it be, and what to change", _plan)
    plan.add_argument("recipe", type=Path, help="YAML file of a training stage; needs no checkpoint and no GPU")
    _add_keys(plan, "for example parallel.ep=4")
    plan.add_argument("--nodes", type=int, help="default: what the recipe's name ends in (_4x8: 4 nodes of 8), else 1")
    plan.add_argument("--gpus-per-node", type=int, help="default: likewise, else 8")
    plan.add_argument("--prompt-tokens", type=int, help="the longest prompt of a rollout; default: 512")
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    export = command("export", "write a deployable chat checkpoint, verified by loading it", _export)
    export.add_argument("checkpoint", type=Path)
    export.add_argument(
        "--to",
        nargs="+",
        default=["hf"],
        metavar="TARGET",
        help="hf: a directory for transformers and what reads it; gguf:F32, gguf:F16, gguf:BF16, gguf:Q8_0: llama.cpp; "
        "gguf:Q6_K, gguf:Q5_K_M, gguf:Q4_K_M: the same by its quantizer; adapter: a LoRA checkpoint as it is, for PEFT",
    )
    export.add_argument("--base", help="of --to adapter: what its users know the base as, such as its name on the hub")
    export.add_argument("--output", type=Path, help="default: <checkpoint>-export")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parity = command("parity", "do all engines compute the same model, and if not, which mistake is it", _parity)
    parity.add_argument("checkpoint", type=Path, help="full, adapter or exported checkpoint")
    parity.add_argument(
        "--prompts", type=Path, help="JSONL file: messages, prompt or text a line; fixed ones by default"
    )
    parity.add_argument("--exported", type=Path, help="directory to compare; a fresh export by default")
    parity.add_argument(
        "--gguf", type=Path, nargs="+", default=[], help="files for llama.cpp; a fresh F32 one by default"
    )
    parity.add_argument("--python", nargs="+", default=[], help="interpreters of other environments with transformers")
    parity.add_argument(
        "--endpoint", nargs="+", default=[], metavar="URL", help="servers with OpenAI's completions API"
    )
    parity.add_argument("--endpoint-precision", default="BF16", help="of a server's weights; F32 for the strict limits")
    parity.add_argument("--json", action="store_true", help="print JSON")
    release = command("release", "export, and mark the result if it passes every gate", _release)
    release.add_argument("checkpoint", type=Path)
    _add_keys(release, "for example thresholds.exact_match=0.9")
    release.add_argument("--recipe", type=Path, help="default: the evaluation that the checkpoint was trained with")
    release.add_argument("--output", type=Path, help="default: <checkpoint>-release")
    release.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    chat = command("chat", "talk to a checkpoint in the terminal", _chat)
    chat.add_argument("checkpoint", type=Path)
    chat.add_argument("--system", help="system prompt; the template's own if not given")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    chat.add_argument("--max-tokens", type=int, default=256)
    chat.add_argument("--seed", type=int, default=0)
    generate = command(
        "generate", "sample answers to a file of prompts, for rejection sampling or evaluation", _generate
    )
    generate.add_argument("checkpoint", type=Path, help="full, adapter or exported checkpoint")
    generate.add_argument("prompts", help="JSONL or Parquet file; or synthetic:prompts, synthetic:heldout")
    generate.add_argument("output", type=Path, help="JSONL file, a line per prompt; run again to go on with it")
    _add_keys(generate, "num_samples=16 temperature=0.7, and so on")
    generate.epilog = "keys and their defaults: " + " ".join(generation_keys())
    experts = command("experts", "expert load by layer and domain, and how checkpoints differ in it", _experts)
    experts.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="several are compared; a run stands for all of its",
    )
    experts.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE[:FIELD,FIELD]",
        help="a domain: JSONL, Parquet, synthetic:sft",
    )
    experts.add_argument("--max-tokens", type=int, default=100_000, help="of each domain; default: 100000")
    experts.add_argument("--max-length", type=int, default=2048, help="tokens of a sequence; longer ones are cut")
    experts.add_argument(
        "--output", type=Path, help="the page; default: <last checkpoint>-experts.html, JSON beside it"
    )
    experts.add_argument("--json", action="store_true", help="print JSON")
    report = command("report", "write one self-contained HTML page about a run, or several", _report)
    report.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN", help="several are compared")
    report.add_argument("--output", type=Path, help="default: <RUN>/report.html; of several, compare.html beside them")
    return parser


def _add_keys(command: argparse.ArgumentParser, example: str) -> None:
    # Without the default argparse would say of them, too, that they are required.
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=example)


class _Tasks(argparse.Action):
    """`--tasks`; as `--version` does, `list` answers and ends the program, whatever else there is or is not."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values == "list":
            from dots_align.evals.task import task_names

            print("\n".join(task_names()))
            parser.exit()
        setattr(namespace, self.dest, values)


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "target", type=Path, metavar="recipe|checkpoint", help="YAML file, or with --tasks a directory"
    )
    _add_keys(evaluate, "of a recipe, or sampling keys of tasks: max_tokens=512")
    help_of_tasks = "gsm8k,cmath and so on, or paths of .yaml files; `list` names all"
    evaluate.add_argument("--tasks", default="", action=_Tasks, help=help_of_tasks)
    evaluate.add_argument("--lm-eval", default="", help="tasks of lm-evaluation-harness, with its prompts and metrics")
    evaluate.add_argument("--lm-eval-tasks", type=Path, help="folder with more tasks for it")
    evaluate.add_argument("--chat", action="store_true", help="its prompts become user's turns")
    evaluate.add_argument("--data", type=Path, help="folder under which the tasks' files lie")
    evaluate.add_argument("--hub", action="store_true", help="read from the Hugging Face hub what is not there")
    evaluate.add_argument("--limit", type=int, help="at most so many records of each task")
    evaluate.add_argument("--shots", type=int, help="examples in front of each prompt; default: the task's own number")
    evaluate.add_argument(
        "--judge", help="address of an OpenAI-compatible endpoint, http://…/v1, for tasks with a judge"
    )
    evaluate.add_argument("--judge-model", default="judge", help="the judge's name there")
    evaluate.add_argument("--output", type=Path, help="folder for the results; default: <checkpoint>/evals")


def _stage(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, options.command)
    from dots_align.run_directory import leave_run_directories
    from dots_align.runtime import setup_logging

    setup_logging()
    try:
        _run_stage(recipe)
    finally:
        leave_run_directories()


def _run_stage(recipe: Any) -> None:
    from dots_align.runtime import is_main_process, start_processes, stop_processes, world_size

    if recipe.stage in ("grpo", "ppo") and recipe.launch.backend == "verl":
        from dots_align.verl_plugin.launch import run

        print(run(recipe))
        return
    if recipe.stage != "pipeline":
        from dots_align.checkpoint import check_parallel

        check_parallel(recipe)
        if recipe.parallel.backend == "deepspeed":
            from dots_align.stages.zero import check_deepspeed

            check_deepspeed(recipe, world_size())
    if world_size() > 1 and recipe.stage != "pipeline":
        start_processes(recipe.parallel.timeout_minutes)
    last = importlib.import_module(f"dots_align.stages.{recipe.stage}").run(recipe)
    if recipe.stage != "pipeline" and is_main_process():
        print(last)
    stop_processes()


def _eval(options: argparse.Namespace) -> None:
    if options.tasks or options.lm_eval:
        _eval_tasks(options)
        return
    if options.target.is_dir():
        raise ValueError(f"{options.target}: give --tasks for a checkpoint directory, or the YAML file of a recipe")
    recipe = load_recipe(options.target, options.overrides, "eval")
    from dots_align.runtime import is_main_process, setup_logging, stop_processes

    setup_logging()
    from dots_align.checkpoint import check_parallel
    from dots_align.evals.command import run_recipe

    if recipe.model.path is None:
        raise ValueError("model.path is not set; give the checkpoint directory to evaluate")
    check_parallel(recipe)
    output = run_recipe(recipe)
    if is_main_process():
        print(output)
    stop_processes()


def _eval_tasks(options: argparse.Namespace) -> None:
    if options.hub:
        os.environ["HF_HUB_OFFLINE"] = "0"
    from dots_align.runtime import is_main_process, setup_logging, stop_processes

    setup_logging()
    from dots_align.evals.command import run

    output = run(options)
    if is_main_process():
        print(output)
    stop_processes()


def _plan(options: argparse.Namespace) -> None:
    from dots_align.planner.command import run

    launch = options.nodes, options.gpus_per_node
    print(run(options.recipe, options.overrides, *launch, options.prompt_tokens, options.json))


def _export(options: argparse.Namespace) -> None:
    from dots_align.runtime import setup_logging

    setup_logging()
    from dots_align.export.adapter import export_adapter
    from dots_align.export.targets import export

    checkpoint = options.checkpoint.resolve()
    output = options.output or checkpoint.with_name(f"{checkpoint.name}-export")
    if options.to == ["adapter"] and options.base:
        print(export_adapter(checkpoint, output, options.base, options.overwrite))
    elif "adapter" in options.to or options.base:
        raise ValueError("--to adapter, by itself, and --base NAME go together: what its users know the base as")
    else:
        print(export(checkpoint, output, options.overwrite, options.to))


def _parity(options: argparse.Namespace) -> None:
    from dots_align.runtime import setup_logging

    setup_logging()
    from dots_align.parity.check import Sources
    from dots_align.parity.command import run

    sources = Sources(
        options.exported,
        tuple(options.gguf),
        tuple(options.python),
        tuple(options.endpoint),
        options.endpoint_precision,
    )
    if not run(options.checkpoint, options.prompts, sources, options.json):
        sys.exit(1)


def _release(options: argparse.Namespace) -> None:
    from dots_align.runtime import setup_logging

    setup_logging()
    from dots_align.release.command import recipe_for, release

    checkpoint = options.checkpoint.resolve()
    recipe = recipe_for(checkpoint, options.recipe, options.overrides)
    output = options.output or checkpoint.with_name(f"{checkpoint.name}-release")
    record, ok = release(checkpoint, output, recipe, options.overwrite)
    print(record)
    if not ok:
        sys.exit(1)


def _chat(options: argparse.Namespace) -> None:
    from dots_align.runtime import setup_logging

    setup_logging()
    from dots_align.terminal_chat import chat

    chat(
        options.checkpoint,
        system=options.system,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def _generate(options: argparse.Namespace) -> None:
    request = load_options(options.checkpoint, options.prompts, options.overrides)
    from dots_align.runtime import is_main_process, setup_logging, stop_processes

    setup_logging()
    from dots_align.generation.command import generate

    generate(request, options.output)
    if is_main_process():
        print(options.output)
    stop_processes()


def _experts(options: argparse.Namespace) -> None:
    from dots_align.runtime import setup_logging

    setup_logging()
    from dots_align.experts.command import run

    how = options.output, options.max_tokens, options.max_length, options.json
    print(run(options.checkpoints, options.data, *how))


def _report(options: argparse.Namespace) -> None:
    from dots_align.report.page import write_report

    print(write_report(options.run_dirs, options.output))
