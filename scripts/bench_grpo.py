"""How much faster than TRL is a GRPO step of ours, and does it teach as well?

`dots-align grpo` (the embedded loop, run as a recipe would be) against TRL's GRPOTrainer at sensible defaults:
transformers' `generate`, no vLLM, no gradient checkpointing, several sequences to a micro-batch. Both sides start from
the same weights, see the same prompts in the same order, sample as many responses to each, score them by the same
function, and take one optimizer step per rollout with the same loss. The weights have seen some steps of SFT, so that
answers end by themselves, at lengths that differ. The reward is the share of digits in an answer: it tells any two
answers apart, and can be raised in a few steps.

Each preset runs in both dtypes (bfloat16: `train.bf16`, TRL's `bf16`) `plain`, which is TRL's default: no KL term, so
that nobody needs log-probs beforehand, and with `kl`, a KL term to a frozen reference. A step is split, by a clock
around each side's own methods, into

    rollout   sampling               score   the reward function
    logprob   forwards without gradients: of the reference, or of the policy before the update
    update    forward, backward, clipping, optimizer               other   what is left of the step

All are medians over steps; the first step of each run is warm-up. Ours tells malloc to keep what is freed; before TRL's
turn that is undone. Prints a table and both reward curves, then one line
`RESULT {json}` with the keys

    step_ratio   TRL's seconds per step over ours, the worst row
    split        {phase: [ours, TRL]} seconds of that row
    rows         of each row `preset dtype setting`: its ratio, split, and both reward curves
    reward       [ours, TRL] mean reward over the last quarter of the steps of the longest run
    quick        what was run
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from dots_align.checkpoint import load_model
from dots_align.config import GrpoRecipe, ModelSection, load_recipe
from dots_align.data.chat import as_dicts
from dots_align.data.sources import load_prompts
from dots_align.model.training import TrainingEngine
from dots_align.runtime import setup_logging
from dots_align.scoring import Scoring
from dots_align.scoring.functions import load_function
from dots_align.stages import grpo, sft
from dots_align.stages.loop import RlLoop
from dots_align.stages.rollouts import Collector, PromptSampler
from dots_align.types import Message, Prompt, Response

PHASES = ("rollout", "score", "logprob", "update", "other")
ROOT = Path(__file__).resolve().parents[1]
WARMUP_STEPS = 1
LEARNING_RATES = {"tiny": 2e-4, "small": 2e-5}
SFT_STEPS = {"tiny": 80, "small": 16}  # of 512 tokens
MAX_TOKENS = 48
TRL_MICRO_BATCH = 64  # sequences; TRL's default of 8 is slower here
SETTINGS = {"plain": 0.0, "kl": 0.05}
DTYPES = ("float32", "bfloat16")
# (prompts, responses to each) of a step: of tiny those of its recipe; of small few, so that all takes minutes.
SIZES = {"tiny": (32, 8), "small": (4, 8)}
STEPS = {"tiny": 2, "small": 1}  # after the warm-up
LONG = {("tiny", "float32", "plain"): 8, ("small", "float32", "plain"): 2}  # the first for its reward curve
REWARD = '''
from dots_align.types import reward_range

@reward_range(0, 1)
def digits(response):
    """Share of the answer's characters that are digits."""
    return sum(c.isascii() and c.isdigit() for c in response.text) / max(len(response.text), 1)
'''


class Clock:
    """Seconds of each phase of each step, phases inside phases taken off those around them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # of each phase that runs, what other phases have taken in it
        self._began = 0.0

    def begin(self) -> None:
        self._seconds.clear()
        self._began = time.perf_counter()

    def end(self, rest: str) -> None:
        """A step is over; what no phase has taken is `rest`'s."""
        whole = time.perf_counter() - self._began
        self._seconds[rest] += whole - sum(self._seconds.values())
        self.steps.append({"step": whole, **{phase: self._seconds[phase] for phase in PHASES}})

    def timed(self, phase: Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            name, began = phase(), time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole, inside = time.perf_counter() - began, self._inside.pop()
                self._seconds[name] += whole - inside
                if self._inside:
                    self._inside[-1] += whole

        return run

    @contextmanager
    def watching(self, methods: dict[str, tuple[type, Callable[[], str]]]) -> Iterator[None]:
        """Times methods, {name: (class, phase)}, inside this context."""
        with ExitStack() as stack:
            for name, (owner, phase) in methods.items():
                stack.enter_context(mock.patch.object(owner, name, self.timed(phase, getattr(owner, name))))
            yield


def always(phase: str) -> Callable[[], str]:
    return lambda: phase


@dataclass(frozen=True)
class Task:
    """What both sides of one comparison do: `num_steps` steps (with the warm-up) of `num_prompts` x `group_size`."""

    start: Path
    reward: Path
    kl_coef: float
    dtype: str
    num_prompts: int
    group_size: int
    num_steps: int
    learning_rate: float
    seed: int

    def recipe(self, directory: Path) -> GrpoRecipe:
        return GrpoRecipe.model_validate(
            {
                "stage": "grpo",
                "output_dir": str(directory),
                "seed": self.seed,
                "model": {"path": str(self.start)},
                "data": {"path": "synthetic:prompts", "max_samples": self.num_prompts * self.num_steps},
                "rewards": [{"function": f"{self.reward}:digits"}],
                "rollout": {"group_size": self.group_size, "max_tokens": MAX_TOKENS, "max_num_sequences": 256},
                "algorithm": {"name": "grpo", "kl_coef": self.kl_coef},
                "train": {"max_steps": self.num_steps, "num_prompts_per_step": self.num_prompts}
                | {"bf16": self.dtype == "bfloat16"},
                "optim": {"learning_rate": self.learning_rate, "lr_scheduler_type": "constant"},
                "save": {"save_steps": None},
            }
        )


@dataclass
class Side:
    """What was measured of one side."""

    steps: list[dict[str, float]]
    rewards: list[float]
    lengths: list[float]
    phases: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        timed = self.steps[WARMUP_STEPS:]
        self.phases = {name: statistics.median(step[name] for step in timed) for name in ("step", *PHASES)}


def run_ours(task: Task, directory: Path) -> Side:
    clock, step = Clock(), RlLoop.train_step

    def whole_step(*args: Any) -> Any:
        clock.begin()
        found = step(*args)
        clock.end("other")
        return found

    methods: dict[str, tuple[type, Callable[[], str]]] = {
        "_advance": (Collector, always("rollout")),
        "results": (Scoring, always("score")),
        "infer_batch": (TrainingEngine, always("logprob")),
        "train_batch": (TrainingEngine, always("update")),
    }
    with clock.watching(methods), mock.patch.object(RlLoop, "train_step", whole_step):
        grpo.run(task.recipe(directory / "run"))
    log = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards, lengths = ([line[f"grpo/{name}"] for line in log] for name in ("reward", "response_length"))
    return Side(clock.steps, rewards, lengths)


class StepClock(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.end("update")  # with clipping and the optimizer, which the Trainer does between our methods


def trl_arguments(task: Task, directory: Path) -> GRPOConfig:
    sequences = task.num_prompts * task.group_size
    micro_batch = min(TRL_MICRO_BATCH, sequences)
    return GRPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=sequences // micro_batch,
        num_generations=task.group_size,
        max_completion_length=MAX_TOKENS,
        max_steps=task.num_steps,
        seed=task.seed,
        shuffle_dataset=False,
        loss_type="grpo",
        beta=task.kl_coef,
        use_bias_correction_kl=False,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        use_cpu=not torch.cuda.is_available(),
        bf16=task.dtype == "bfloat16",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def prompts_of(task: Task, directory: Path) -> list[Prompt]:
    """In the order in which our loop draws them."""
    recipe = task.recipe(directory)
    prompts = load_prompts(recipe.data, recipe.seed)
    return [prompts[i] for _, i in PromptSampler(len(prompts), recipe.seed).draw(0, len(prompts))]


def undo_keep_freed_memory() -> None:
    """malloc's thresholds become what they grow to by themselves where tensors of some 32 MiB come and go."""
    glibc = ctypes.CDLL(None)
    if hasattr(glibc, "mallopt"):
        glibc.mallopt(-1, 64 * 2**20)  # M_TRIM_THRESHOLD
        glibc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        glibc.malloc_trim(0)


def run_trl(task: Task, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Side:
    undo_keep_freed_memory()
    clock, digits = Clock(), load_function(f"{task.reward}:digits", "reward")

    def reward(completions: list[Any], **_: Any) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        return [digits(Response(Prompt([Message("user", "")]), text)) for text in texts]

    methods: dict[str, tuple[type, Callable[[], str]]] = {
        "_prepare_inputs": (GRPOTrainer, always("other")),
        "_generate": (GRPOTrainer, always("rollout")),
        "_calculate_rewards": (GRPOTrainer, always("score")),
        "_get_per_token_logps_and_entropies": (
            GRPOTrainer,
            lambda: "update" if torch.is_grad_enabled() else "logprob",
        ),
    }
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.start),
        reward_funcs=reward,
        args=trl_arguments(task, directory),
        train_dataset=Dataset.from_list([{"prompt": as_dicts(p.messages)} for p in prompts_of(task, directory)]),
        processing_class=tokenizer,
        callbacks=[StepClock(clock)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with clock.watching(methods):
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards, lengths = ([line[name] for line in log] for name in ("reward", "completions/mean_length"))
    return Side(clock.steps, rewards, lengths)


# ----------------------------------------------------------------------------------------------------------------- main


def compare(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[Side, Side]:
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as trl:
        return run_ours(task, Path(ours)), run_trl(task, tokenizer, Path(trl))


def print_row(name: str, ours: Side, trl: Side) -> None:
    for label, side in (("ours", ours), ("TRL", trl)):
        seconds = " ".join(f"{side.phases[phase]:8.3f}" for phase in ("step", *PHASES))
        ratio = f"{trl.phases['step'] / ours.phases['step']:8.2f}x" if side is ours else ""
        print(f"{name if side is ours else '':20} {label:5} {seconds} {ratio}")
    for label, side in (("ours", ours), ("TRL", trl)):
        curve = " ".join(f"{value:.3f}" for value in side.rewards)
        print(f"  reward, {label:5} {curve}   (mean answer: {statistics.mean(side.lengths):.1f} tokens)", flush=True)


def row_of(ours: Side, trl: Side) -> dict[str, Any]:
    return {
        "step_ratio": float(f"{trl.phases['step'] / ours.phases['step']:.3g}"),
        "split": {p: [round(ours.phases[p], 4), round(trl.phases[p], 4)] for p in ("step", *PHASES)},
        "rewards": [[round(value, 4) for value in side.rewards] for side in (ours, trl)],
    }


def last_quarter(rewards: list[float]) -> float:
    return statistics.mean(rewards[-max(len(rewards) // 4, 1) :])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny, few and short steps: under a minute on 2 cores")
    parser.add_argument("--presets", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--settings", nargs="*", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, help="timed steps of each run (default: see STEPS, LONG)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of what is sampled (default 0)")
    options = parser.parse_args()
    if options.quick:
        options.presets, options.settings, options.dtypes, options.steps = ["tiny"], ["kl"], ["float32"], 2
    return options


def start_of(preset: str, num_steps: int, directory: Path) -> Path:
    """A checkpoint of a preset after a little SFT."""
    keys = [
        f"output_dir={directory}",
        f"model.preset={preset}",
        f"data.max_samples={20 * num_steps}",
        f"train.max_steps={num_steps}",
        "train.max_length=512",
        f"train.bf16={str(preset == 'small').lower()}",  # half the time, and what comes out is only where all start
        f"optim.learning_rate={3e-3 if preset == 'tiny' else 1e-3}",
        "optim.warmup_steps=3",
        "save.save_steps=null",
        "on_save=[]",
    ]
    return sft.run(load_recipe(ROOT / "recipes/tiny/sft.yaml", keys))


def main() -> None:
    options = parse()
    setup_logging()
    rows: dict[str, dict[str, Any]] = {}
    print(f"\n{'seconds':20} {'':5} " + " ".join(f"{name:>8}" for name in ("step", *PHASES)) + "  TRL / ours")
    with tempfile.TemporaryDirectory() as scratch:
        reward = Path(scratch) / "digit_share.py"
        reward.write_text(REWARD, encoding="utf-8")
        for preset in options.presets:
            start = start_of(preset, 3 if options.quick else SFT_STEPS[preset], Path(scratch) / preset)
            _, tokenizer = load_model(ModelSection(path=str(start)))
            for dtype, setting in itertools.product(options.dtypes, options.settings):
                name = f"{preset} {dtype} {setting}"
                size = (4, 4) if options.quick else SIZES[preset]
                steps = WARMUP_STEPS + (options.steps or LONG.get((preset, dtype, setting), STEPS[preset]))
                task = Task(start, reward, SETTINGS[setting], dtype, *size, steps, LEARNING_RATES[preset], options.seed)
                ours, trl = compare(task, tokenizer)
                print_row(name, ours, trl)
                rows[name] = row_of(ours, trl)
    worst = min(rows.values(), key=lambda row: row["step_ratio"])
    longest = max(rows.values(), key=lambda row: len(row["rewards"][0]))
    summary = {
        "step_ratio": worst["step_ratio"],
        "split": {phase: worst["split"][phase] for phase in PHASES},
        "reward": [round(last_quarter(curve), 4) for curve in longest["rewards"]],
        "rows": rows,
        "quick": options.quick,
    }
    print("RESULT " + json.dumps(summary))


if __name__ == "__main__":
    main()
