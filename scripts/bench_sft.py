"""How much faster than stock TRL are our SFT and DPO, and how much less memory does a step need?

Every side starts from the same weights, sees the same examples in the same batches and order, and takes real optimizer
steps through its own trainer's `train()`. The sides are

    ours     dots_align's stage: packed sequences, its attention and experts, log-probs of labelled tokens only
    stock    TRL's SFTTrainer or DPOTrainer on transformers' model as it comes: sdpa, padded batches, a live reference
    best     TRL at its best: SFT on packed rows (`padding_free`), DPO with reference log-probs computed beforehand

all without gradient checkpointing. Tokens are those of the examples, without padding, the same for every side; the time
DPO spends on the reference counts. Sides take turns, the ratio is the median over rounds. The examples are worked
arithmetic of our synthetic data, several questions to a conversation, so that lengths spread as in real data (a
padded batch is about half full).

Memory is the growth of one SFT step's resident memory over what the process held before it, each side in a process of
its own: one row of 4096 tokens, a vocabulary of 152064, a hidden size so small that the head is nearly all of it.

Prints tables, then one line `RESULT {json}` with the keys

    sft_ratio dpo_ratio                   our tokens/s over stock's, the worst over presets and dtypes
    sft_ratio_vs_best dpo_ratio_vs_best   the same over the faster of stock and best
    max_loss_diff                         largest difference of a step's loss to stock's, fp32
    max_loss_diff_bf16                    the same in bf16, where routing of near-ties differs
    peak_ratio                            stock's memory of a step over ours
    quick                                 what was run
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, Dots1ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dots_align.checkpoint import ensure_start, load_model
from dots_align.config import DataSection, ModelSection, SftRecipe
from dots_align.data.chat import as_dicts, encode_conversation
from dots_align.data.sources import load_conversations, load_preference_pairs
from dots_align.model import attention
from dots_align.model.dots1 import create_model, preset_config
from dots_align.stages.losses import LeanDpoTrainer, LeanSftTrainer
from dots_align.types import Message

SIDES = ("ours", "stock", "best")
MAX_QUESTIONS, MAX_LENGTH = 12, 1024
LEARNING_RATE = 1e-4
WARMUP_STEPS = 1  # of each round: the first step of a process or a shape pays for what later ones reuse


@dataclass
class Measured:
    """One side of one comparison: tokens/s of each round, and the losses of the first round."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class StepClock(transformers.TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


# ------------------------------------------------------------------------------------------------------------- examples


def spread(seed: int) -> Callable[[], int]:
    """Draws how many questions a conversation holds: log-normal, so a few are many times as long as most."""
    rng = random.Random(seed)
    return lambda: min(MAX_QUESTIONS, max(1, round(rng.lognormvariate(math.log(2), 0.8))))


def joined(parts: Sequence[str]) -> str:
    return "\n".join(parts)


def sft_examples(tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of conversations of several questions."""
    draw = spread(0)
    source = iter(load_conversations(DataSection(path="synthetic:sft", max_samples=count * MAX_QUESTIONS), 0))
    examples = []
    for _ in range(count):
        texts = [[m.content for m in next(source).messages[-2:]] for _ in range(draw())]
        question, answer = (joined(column) for column in zip(*texts, strict=True))
        encoded = encode_conversation(tokenizer, [Message("user", question), Message("assistant", answer)])
        examples.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
    return examples


def dpo_examples(count: int) -> list[dict[str, Any]]:
    """Preference pairs over several questions, in TRL's conversational form."""
    draw = spread(1)
    source = iter(load_preference_pairs(DataSection(path="synthetic:preference", max_samples=count * MAX_QUESTIONS), 0))
    examples = []
    for _ in range(count):
        pairs = [next(source) for _ in range(draw())]
        answers = {
            key: as_dicts([Message("assistant", joined([getattr(p, key) for p in pairs]))])
            for key in ("chosen", "rejected")
        }
        question = joined([p.prompt[-1].content for p in pairs])
        examples.append({"prompt": as_dicts([Message("user", question)]), **answers})
    return examples


def dpo_tokens(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> int:
    """Tokens of both conversations of a pair, the prompt in each of them."""
    render: Any = tokenizer.apply_chat_template
    return sum(len(render(example["prompt"] + example[key], return_dict=True)["input_ids"]) for key in ANSWERS)


ANSWERS = ("chosen", "rejected")

# ---------------------------------------------------------------------------------------------------------------- sides


def arguments(directory: Path, dtype: str, batch: int, **others: Any) -> dict[str, Any]:
    """What both trainers are given on every side."""
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": dtype == "bfloat16",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **others,
    }


def model_of(side: str, start: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(ModelSection(path=str(start)))
    if side != "ours":
        model = AutoModelForCausalLM.from_pretrained(start)
    return model, tokenizer


def sft_trainer(side: str, start: Path, directory: Path, dtype: str, examples: list, batch: int) -> SFTTrainer:
    """Ours and best get one row per batch, its examples one after the other; stock gets the examples."""
    model, tokenizer = model_of(side, start)
    packed = side != "stock"
    rows = [row_of(examples[i : i + batch]) for i in range(0, len(examples), batch)] if packed else examples
    options = arguments(directory, dtype, 1 if packed else batch, max_length=None, padding_free=packed)
    trainer_class = LeanSftTrainer if side == "ours" else SFTTrainer
    return trainer_class(
        model=model,
        args=SFTConfig(**options),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )


def row_of(examples: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for e in examples for token in e["input_ids"]],
        "labels": [label for e in examples for label in e["labels"]],
        "seq_lengths": [len(e["input_ids"]) for e in examples],
    }


def dpo_trainer(side: str, start: Path, directory: Path, dtype: str, examples: list, batch: int) -> DPOTrainer:
    model, tokenizer = model_of(side, start)
    options = arguments(
        directory, dtype, batch, max_length=MAX_LENGTH, beta=0.1, precompute_ref_log_probs=side != "stock"
    )
    return timed_reference(LeanDpoTrainer if side == "ours" else DPOTrainer)(
        model=model,
        args=DPOConfig(**options),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(examples),
    )


def timed_reference(trainer_class: Any) -> Any:
    """The trainer, adding up what it spends on the reference before training."""

    class Timed(trainer_class):
        reference_seconds = 0.0

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            started = time.perf_counter()
            found = super().compute_ref_log_probs(model, inputs)
            self.reference_seconds += time.perf_counter() - started
            return found

    return Timed


TRAINERS: dict[str, Callable[..., Any]] = {"sft": sft_trainer, "dpo": dpo_trainer}


def run_round(
    stage: str, side: str, start: Path, dtype: str, examples: list, batch: int, tokens: list[int]
) -> tuple[float, list[float]]:
    """Trains one side on all examples; returns tokens/s after the warm-up, and each step's loss."""
    with tempfile.TemporaryDirectory() as scratch:
        transformers.set_seed(0)
        trainer = TRAINERS[stage](side, start, Path(scratch), dtype, examples, batch)
        trainer.remove_callback(transformers.PrinterCallback)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
    skipped = WARMUP_STEPS * batch
    seconds = clock.ends[-1] - clock.ends[WARMUP_STEPS - 1]
    seconds += getattr(trainer, "reference_seconds", 0.0) * (1 - skipped / len(examples))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(tokens[skipped:]) / seconds, losses


def compare(stage: str, preset: str, dtype: str, start: Path, options: argparse.Namespace) -> dict[str, Measured]:
    """All sides in turns, `rounds` times."""
    batch = options.batch
    count = batch * (options.steps + WARMUP_STEPS)
    _, tokenizer = load_model(ModelSection(path=str(start)))
    if stage == "sft":
        examples = sft_examples(tokenizer, count)
        tokens = [len(e["input_ids"]) for e in examples]
    else:
        examples = dpo_examples(count)
        tokens = [dpo_tokens(tokenizer, e) for e in examples]
    measured = {side: Measured() for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES:
            rate, losses = run_round(stage, side, start, dtype, examples, batch, tokens)
            measured[side].rates.append(rate)
            if number == 0:
                measured[side].losses = losses
    print_row(stage, preset, dtype, measured)
    return measured


def ratio(measured: dict[str, Measured], side: str) -> float:
    return statistics.median(a / b for a, b in zip(measured["ours"].rates, measured[side].rates, strict=True))


def loss_difference(measured: dict[str, Measured]) -> float:
    ours, stock = measured["ours"].losses, measured["stock"].losses
    return max(abs(a - b) for a, b in zip(ours, stock, strict=True))


def print_row(stage: str, preset: str, dtype: str, measured: dict[str, Measured]) -> None:
    rates = " ".join(f"{statistics.median(measured[side].rates):9.0f}" for side in SIDES)
    ratios = " ".join(f"{ratio(measured, side):8.2f}" for side in SIDES[1:])
    print(f"{stage:5} {preset:6} {dtype:9} {rates} {ratios} {loss_difference(measured):10.1e}", flush=True)


# --------------------------------------------------------------------------------------------------------------- memory


def step_memory(side: str, vocabulary: int, num_tokens: int) -> None:
    """In a process of its own: one SFT step on one row; prints the MiB it added."""
    config = preset_config(
        "tiny", vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, max_position_embeddings=num_tokens
    )
    config._attn_implementation = attention.IMPLEMENTATION if side == "ours" else "sdpa"
    with tempfile.TemporaryDirectory() as scratch:
        _, tokenizer = load_model(ModelSection(path=str(start_of("tiny", Path(scratch)))))
        model: Dots1ForCausalLM = create_model(config, 0)
        ids = torch.randint(0, vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        row = {"input_ids": ids, "labels": ids, "seq_lengths": [num_tokens]}
        options = arguments(Path(scratch), "float32", 1, max_length=None, padding_free=True)
        trainer = (LeanSftTrainer if side == "ours" else SFTTrainer)(
            model=model,
            args=SFTConfig(**options),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([row]),
        )
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = pages * resource.getpagesize() / 2**20
        trainer.train()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before)


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
    recipe = SftRecipe(stage="sft", output_dir=str(directory), model=ModelSection(preset=preset), data=data)
    started = ensure_start(recipe, directory)
    return Path(str(started.path))


def summarise(results: dict[tuple[str, str, str], dict[str, Measured]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for stage in TRAINERS:
        found = [m for (s, _, _), m in results.items() if s == stage]
        if found:
            summary[f"{stage}_ratio"] = min(ratio(m, "stock") for m in found)
            summary[f"{stage}_ratio_vs_best"] = min(min(ratio(m, "stock"), ratio(m, "best")) for m in found)
    for dtype, key in (("float32", "max_loss_diff"), ("bfloat16", "max_loss_diff_bf16")):
        found = [loss_difference(m) for (_, _, d), m in results.items() if d == dtype]
        if found:
            summary[key] = max(found)
    return summary


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny only, few steps, a smaller memory case")
    parser.add_argument("--stages", nargs="*", choices=tuple(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--presets", nargs="*", choices=("tiny", "small"), default=["tiny", "small"])
    parser.add_argument("--dtypes", nargs="*", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps a round (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns (default 3)")
    parser.add_argument("--batch", type=int, default=16, help="conversations, or pairs, a step (default 16)")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory comparison out")
    parser.add_argument("--memory-of", nargs=3, metavar=("SIDE", "VOCABULARY", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.presets, options.steps, options.rounds, options.batch = ["tiny"], 2, 1, 8
    return options


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.memory_of:
        side, vocabulary, num_tokens = options.memory_of
        step_memory(side, int(vocabulary), int(num_tokens))
        return
    print(f"\n{'':23}{'tokens/s':>9}{'':21} {'ours over':>17}")
    print(f"{'stage':5} {'preset':6} {'dtype':9} {'ours':>9} {'stock':>9} {'best':>9} {'stock':>8} {'best':>8} loss diff")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for preset in options.presets:
            start = start_of(preset, Path(scratch) / preset)
            for stage in options.stages:
                for dtype in options.dtypes:
                    results[stage, preset, dtype] = compare(stage, preset, dtype, start, options)
    summary = summarise(results)
    if not options.no_memory:
        summary["peak_ratio"] = compare_memory(*((32768, 1024) if options.quick else (152064, 4096)))
    rounded = {key: float(f"{value:.3g}") for key, value in summary.items()}
    print("RESULT " + json.dumps({**rounded, "quick": options.quick}))


if __name__ == "__main__":
    main()
