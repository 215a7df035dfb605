"""How much faster than stock TRL are our SFT and DPO, and how much less memory does a step need?

Every side starts from the same weights, sees the same examples in the same batches and order, and takes real optimizer
steps. The sides are

    ours     `dots-align sft` and `dots-align dpo`, run as a recipe would be
    stock    TRL's SFTTrainer or DPOTrainer on transformers' model as it comes: sdpa, padded batches, a live reference
    best     TRL at its best: SFT on packed rows (`padding_free`), DPO with reference log-probs computed beforehand

all without gradient checkpointing. Tokens are those of the examples, without padding, the same for every side; what DPO
spends on the reference counts, shared out over the steps. Sides take turns, the ratio is the median over the steps of
all rounds. The examples are worked arithmetic of our synthetic data, several questions to a conversation, so that
lengths spread as in real data (a padded batch is about half full).

Memory is what one SFT step adds at its peak to what the process held after a step on a few tokens, each side in a
process of its own: one row of 4096 tokens, a vocabulary of 152064, a hidden size so small that the head is nearly all.

Prints tables, then one line `RESULT {json}` with the keys

    sft_ratio dpo_ratio                   our tokens/s over stock's, the worst over presets and dtypes
    sft_ratio_vs_best dpo_ratio_vs_best   the same over the faster of stock and best
    max_loss_diff                         largest difference of a step's loss to stock's, fp32
    max_loss_diff_bf16                    the same in bf16, where the sides round differently
    peak_ratio                            stock's memory of a step over ours
    quick                                 what was run
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, Dots1ForCausalLM, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dots_align.checkpoint import ensure_start, load_model
from dots_align.config import DataSection, ModelSection, SftRecipe, load_recipe
from dots_align.data.chat import as_dicts, encode_conversation
from dots_align.data.sources import load_conversations, load_preference_pairs
from dots_align.model import attention
from dots_align.model.dots1 import create_model, preset_config
from dots_align.runtime import setup_logging
from dots_align.stages import dpo, sft
from dots_align.stages.losses import LeanSftTrainer
from dots_align.stages.trainer import trainer_arguments
from dots_align.types import Message

STAGES = ("sft", "dpo")
SIDES = ("ours", "stock", "best")
MAX_QUESTIONS, MAX_LENGTH = 12, 1024
WARMUP_STEPS = 1  # of each round: a first step pays for what later ones reuse
# Sequences a step (a preference pair is two) and timed steps a round: of small, few, so that all takes minutes.
BATCH = {"tiny": 16, "small": 4}
STEPS = {"tiny": 5, "small": 2}
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Measured:
    """One side of one comparison: tokens/s of each step of each round, and the losses of the first round."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- examples


def spread(seed: int) -> Callable[[], int]:
    """Draws how many questions a conversation holds: log-normal, so a few are many times as long as most."""
    rng = random.Random(seed)
    return lambda: min(MAX_QUESTIONS, max(1, round(rng.lognormvariate(math.log(2), 0.8))))


def sft_rows(count: int) -> list[dict[str, str]]:
    """Conversations of several questions and their answers, as a data file has them."""
    draw = spread(0)
    data = DataSection(path="synthetic:sft", max_samples=count * MAX_QUESTIONS)
    source = iter([c.messages for c in load_conversations(data, 0)])
    rows = []
    for _ in range(count):
        turns = [next(source)[-2:] for _ in range(draw())]
        prompt, response = ("\n".join(m.content for m in column) for column in zip(*turns, strict=True))
        rows.append({"prompt": prompt, "response": response})
    return rows


def dpo_rows(count: int) -> list[dict[str, str]]:
    """Preference pairs over several questions."""
    draw = spread(1)
    data = DataSection(path="synthetic:preference", max_samples=count * MAX_QUESTIONS)
    source = iter(load_preference_pairs(data, 0))
    rows = []
    for _ in range(count):
        pairs = [next(source) for _ in range(draw())]
        row = {key: "\n".join(getattr(p, key) for p in pairs) for key in ("chosen", "rejected")}
        rows.append({"prompt": "\n".join(p.prompt[-1].content for p in pairs), **row})
    return rows


def conversations(row: dict[str, str]) -> list[list[Message]]:
    """The one of an SFT row, the two of a preference pair."""
    answers = [row[key] for key in ("response", "chosen", "rejected") if key in row]
    return [[Message("user", row["prompt"]), Message("assistant", answer)] for answer in answers]


def drawn(count: int, seed: int) -> list[int]:
    """The order in which transformers' Trainer draws `count` examples in the first epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


# ---------------------------------------------------------------------------------------------------------------- sides


@dataclass
class Task:
    """What all sides of one comparison train on, `batch` rows a step."""

    stage: str
    dtype: str
    start: Path
    rows: list[dict[str, str]]
    batch: int
    tokenizer: PreTrainedTokenizerBase

    def recipe(self, directory: Path) -> Any:
        """The recipe of a run in `directory` on the rows, which are written there."""
        data = directory / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        keys = [
            f"output_dir={directory}/run",
            f"model.path={self.start}",
            f"data.path={data}",
            "data.max_samples=null",
            f"train.per_device_train_batch_size={self.batch}",
            f"train.max_length={MAX_LENGTH}",
            f"train.bf16={'true' if self.dtype == 'bfloat16' else 'false'}",
            "optim.learning_rate=1e-4",
            "optim.lr_scheduler_type=constant",
            "logging.logging_steps=1",
            "save.save_steps=null",
            "on_save=[]",
        ]
        own = ["train.packing=false", "model.preset=null"] if self.stage == "sft" else ["loss_type=[sigmoid]"]
        own += ["loss_weights=null"] if self.stage == "dpo" else []
        return load_recipe(ROOT / f"recipes/tiny/{self.stage}.yaml", [*keys, *own])

    def tokens(self) -> list[int]:
        """Of each step."""
        sizes = [
            sum(len(encode_conversation(self.tokenizer, c).input_ids) for c in conversations(r)) for r in self.rows
        ]
        drawn_sizes = [sizes[i] for i in drawn(len(sizes), 0)]
        return [sum(drawn_sizes[n : n + self.batch]) for n in range(0, len(sizes), self.batch)]


@dataclass
class Timed:
    """When steps ended, their losses, and the seconds spent on the reference before training."""

    ends: list[float]
    losses: list[float]
    reference: float = 0.0


def run_ours(task: Task, directory: Path) -> Timed:
    recipe = task.recipe(directory)
    with reference_clock() as seconds:
        (sft if task.stage == "sft" else dpo).run(recipe)
    log = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in log if f"{task.stage}/loss" in line]
    return Timed([s["time"] for s in steps], [s[f"{task.stage}/loss"] for s in steps], sum(seconds))


def run_trl(task: Task, directory: Path, best: bool) -> Timed:
    """TRL's trainer, with the recipe's arguments and otherwise its own defaults."""
    options = {**trainer_arguments(task.recipe(directory), directory, False), "save_strategy": "no"}
    options |= {"bf16": task.dtype == "bfloat16", "optim": "adamw_torch_fused"}
    trainer_class, config, rows = (sft_side if task.stage == "sft" else dpo_side)(task, options, best)
    clock = StepClock()
    with reference_clock() as seconds:
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(task.start),
            args=config,
            processing_class=task.tokenizer,
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return Timed(clock.ends, [e["loss"] for e in trainer.state.log_history if "loss" in e], sum(seconds))


def sft_side(task: Task, options: dict[str, Any], best: bool) -> tuple[type, SFTConfig, list[dict[str, Any]]]:
    """Examples that TRL pads, or one packed row per batch of the same examples."""
    encoded = [encode_conversation(task.tokenizer, conversations(row)[0]) for row in task.rows]
    examples = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]
    options["max_length"] = None
    if not best:
        return SFTTrainer, SFTConfig(**options), examples
    order = drawn(len(examples), 0)
    groups = [[examples[i] for i in order[n : n + task.batch]] for n in range(0, len(order), task.batch)]
    rows = [
        {
            "input_ids": [token for e in group for token in e["input_ids"]],
            "labels": [label for e in group for label in e["labels"]],
            "seq_lengths": [len(e["input_ids"]) for e in group],
        }
        for group in groups
    ]
    options |= {"per_device_train_batch_size": 1, "padding_free": True, "train_sampling_strategy": "sequential"}
    return SFTTrainer, SFTConfig(**options), rows


def dpo_side(task: Task, options: dict[str, Any], best: bool) -> tuple[type, DPOConfig, list[dict[str, Any]]]:
    rows = []
    for chosen, rejected in map(conversations, task.rows):
        answers = {"chosen": as_dicts(chosen[-1:]), "rejected": as_dicts(rejected[-1:])}
        rows.append({"prompt": as_dicts(chosen[:-1]), **answers})
    return DPOTrainer, DPOConfig(**options, beta=0.1, precompute_ref_log_probs=best), rows


class StepClock(transformers.TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


@contextmanager
def reference_clock() -> Iterator[list[float]]:
    """Seconds of each batch of reference log-probs computed inside."""
    own, seconds = DPOTrainer.compute_ref_log_probs, []

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        found = own(*args)
        seconds.append(time.perf_counter() - started)
        return found

    DPOTrainer.compute_ref_log_probs = timed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield seconds
    finally:
        DPOTrainer.compute_ref_log_probs = own


def run_side(task: Task, side: str) -> tuple[list[float], list[float]]:
    """Trains one side on all rows; returns tokens/s of each step after the warm-up, and each step's loss."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        timed = run_ours(task, directory) if side == "ours" else run_trl(task, directory, side == "best")
    tokens = task.tokens()
    reference = timed.reference / sum(tokens)  # per token
    steps = list(zip(tokens[1:], pairwise(timed.ends), strict=True))[WARMUP_STEPS - 1 :]
    return [n / (end - start + reference * n) for n, (start, end) in steps], timed.losses


def compare(task: Task, rounds: int) -> dict[str, Measured]:
    """All sides in turns."""
    measured = {side: Measured() for side in SIDES}
    for number in range(rounds):
        for side in SIDES:
            rates, losses = run_side(task, side)
            measured[side].rates += rates
            if number == 0:
                measured[side].losses = losses
    return measured


def ratio(measured: dict[str, Measured], side: str) -> float:
    return statistics.median(a / b for a, b in zip(measured["ours"].rates, measured[side].rates, strict=True))


def loss_difference(measured: dict[str, Measured], side: str = "stock") -> float:
    return max(abs(a - b) for a, b in zip(measured["ours"].losses, measured[side].losses, strict=True))


def print_row(stage: str, preset: str, dtype: str, measured: dict[str, Measured]) -> None:
    rates = " ".join(f"{statistics.median(measured[side].rates):9.0f}" for side in SIDES)
    ratios = " ".join(f"{ratio(measured, side):8.2f}" for side in SIDES[1:])
    differences = " ".join(f"{loss_difference(measured, side):10.1e}" for side in SIDES[1:])
    print(f"{stage:5} {preset:6} {dtype:9} {rates} {ratios} {differences}", flush=True)


# --------------------------------------------------------------------------------------------------------------- memory


def resident(field: str) -> float:
    """MiB this process holds (`VmRSS`) or held at most (`VmHWM`). Not getrusage, whose peak is inherited from the
    process that started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{field}:"))


class MemoryMark(transformers.TrainerCallback):
    """Resident MiB after the first step: weights, optimizer, and whatever a first step imports."""

    before = 0.0

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 1:
            self.before = resident("VmRSS")


def step_memory(side: str, vocabulary: int, num_tokens: int) -> None:
    """In a process of its own: a step on a few tokens, then one on `num_tokens`; prints the MiB the latter added."""
    shape = {"vocab_size": vocabulary, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": num_tokens}
    config = preset_config("tiny", **shape)
    config._attn_implementation = attention.IMPLEMENTATION if side == "ours" else "sdpa"
    ids = torch.randint(0, vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": ids[:n], "labels": ids[:n], "seq_lengths": [n]} for n in (16, num_tokens)]
    mark = MemoryMark()
    with tempfile.TemporaryDirectory() as scratch:
        model: Dots1ForCausalLM = create_model(config, 0)
        _, tokenizer = load_model(ModelSection(path=str(start_of("tiny", Path(scratch)))))
        options = {"max_length": None, "padding_free": True, "gradient_checkpointing": False, "bf16": False}
        options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False}
        options |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "disable_tqdm": True}
        trainer = (LeanSftTrainer if side == "ours" else SFTTrainer)(
            model=model,
            args=SFTConfig(output_dir=scratch, num_train_epochs=1, **options),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            callbacks=[mark],
        )
        trainer.train()
    print(resident("VmHWM") - mark.before)


def compare_memory(vocabulary: int, num_tokens: int) -> float:
    """MiB a step adds, ours and stock's; returns stock over ours."""
    found = {}
    for side in ("ours", "stock"):
        command = [sys.executable, __file__, "--memory-of", side, str(vocabulary), str(num_tokens)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[side] = float(done.stdout.split()[-1])
    print(f"\nmemory of a step of {num_tokens} tokens, vocabulary {vocabulary}:")
    print(f"ours {found['ours']:.0f} MiB, stock {found['stock']:.0f} MiB")
    return found["stock"] / found["ours"]


# ----------------------------------------------------------------------------------------------------------------- main


def start_of(preset: Any, directory: Path) -> Path:
    """A fresh checkpoint of a preset."""
    data = DataSection(path="synthetic:sft")
    recipe = SftRecipe(stage="sft", output_dir=str(directory), seed=1, model=ModelSection(preset=preset), data=data)
    return Path(str(ensure_start(recipe, directory).path))


def compare_speed(options: argparse.Namespace) -> dict[str, float]:
    """Prints a row per stage, preset and dtype; returns the worst of each number."""
    print(f"\n{'':23}{'tokens/s':>9}{'':21} {'ours over':>17} {'loss difference to':>21}")
    names = " ".join(f"{side:>9}" for side in SIDES)
    print(f"{'stage':5} {'preset':6} {'dtype':9} {names} {'stock':>8} {'best':>8} {'stock':>10} {'best':>10}")
    results: dict[tuple[str, str], list[dict[str, Measured]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for preset in options.presets:
            start = start_of(preset, Path(scratch) / preset)
            _, tokenizer = load_model(ModelSection(path=str(start)))
            for stage in options.stages:
                batch = (options.batch or BATCH[preset]) // (1 if stage == "sft" else 2)
                count = batch * ((options.steps or STEPS[preset]) + WARMUP_STEPS)
                rows = sft_rows(count) if stage == "sft" else dpo_rows(count)
                for dtype in options.dtypes:
                    found = compare(Task(stage, dtype, start, rows, batch, tokenizer), options.rounds)
                    print_row(stage, preset, dtype, found)
                    results.setdefault((stage, dtype), []).append(found)
    return summarise(results)


def summarise(results: dict[tuple[str, str], list[dict[str, Measured]]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for stage in STAGES:
        if found := [m for (s, _), several in results.items() if s == stage for m in several]:
            summary[f"{stage}_ratio"] = min(ratio(m, "stock") for m in found)
            summary[f"{stage}_ratio_vs_best"] = min(ratio(m, side) for m in found for side in SIDES[1:])
    for dtype, key in (("float32", "max_loss_diff"), ("bfloat16", "max_loss_diff_bf16")):
        if found := [m for (_, d), several in results.items() if d == dtype for m in several]:
            summary[key] = max(map(loss_difference, found))
    return summary


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny only, few steps, a smaller memory case")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--presets", nargs="*", choices=("tiny", "small"), default=["tiny", "small"])
    parser.add_argument("--dtypes", nargs="*", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, help=f"timed optimizer steps a round (default {STEPS})")
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns (default 2)")
    parser.add_argument("--batch", type=int, help=f"sequences a step, two to a preference pair (default {BATCH})")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory comparison out")
    parser.add_argument("--memory-of", nargs=3, metavar=("SIDE", "VOCABULARY", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.presets, options.steps, options.rounds, options.batch = ["tiny"], 2, 1, 8
    return options


def main() -> None:
    options = parse()
    setup_logging()
    if options.memory_of:
        side, vocabulary, num_tokens = options.memory_of
        step_memory(side, int(vocabulary), int(num_tokens))
        return
    summary = compare_speed(options)
    if not options.no_memory:
        summary["peak_ratio"] = compare_memory(*((32768, 1024) if options.quick else (152064, 4096)))
    rounded = {key: float(f"{value:.3g}") for key, value in summary.items()}
    print("RESULT " + json.dumps({**rounded, "quick": options.quick}))


if __name__ == "__main__":
    main()
