"""What a recipe makes one process do: how many tokens a forward holds, how many there are, and how they are kept."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import Dots1Config

from dots_align.config import ModelSection
from dots_align.model.dots1 import preset_config
from dots_align.model.lora import adapter_base
from dots_align.planner.activations import MicroBatch
from dots_align.planner.memory import RolloutBatch, Work
from dots_align.rollout.engine import RolloutEngine

# Assumptions about data that nobody has seen yet.
BUSIEST = 1.5  # rows that reach one process's experts, to the mean: its experts are the popular ones
PADDING = 1.3  # tokens that packed attention computes, to those there are: lengths within a bucket differ
EVALUATION_TOKENS = 16384  # of a forward in which a reward model reads held-out pairs
PROMPT_TOKENS = 512  # the longest prompt of a rollout, unless told


@dataclass(frozen=True)
class Launch:
    nodes: int
    gpus_per_node: int

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus_per_node

    @staticmethod
    def of(recipe: Path, nodes: int | None, gpus_per_node: int | None) -> Launch:
        """What is asked for, else what the recipe's name ends in (`_4x8`: nodes x GPUs), else one node of 8."""
        named = re.search(r"_(\d+)x(\d+)$", recipe.stem)
        found = (int(named[1]), int(named[2])) if named else (1, 8)
        launch = Launch(found[0] if nodes is None else nodes, found[1] if gpus_per_node is None else gpus_per_node)
        if min(launch.nodes, launch.gpus_per_node) < 1:
            raise ValueError(f"{launch.nodes} x {launch.gpus_per_node}: a launch has at least one node with one GPU")
        return launch


@dataclass(frozen=True)
class Load:
    """A step's work on one process beside what it keeps in memory.

    A step has `forwards` with backward, `inferences` (forwards without), `updates` of the optimizer and `waves` of
    sampling. `step_tokens` are all processes' at most, `longest` the longest sequence.
    """

    work: Work
    forwards: int
    inferences: int
    updates: int
    waves: int
    step_tokens: int
    longest: int


def model_config(model: ModelSection) -> tuple[Dots1Config, str]:
    """The shape of a recipe's model, and where it is known from."""
    if model.preset is not None:
        return preset_config(model.preset), f"preset {model.preset}"
    if model.path is None:
        raise ValueError("model.path is not set; give a checkpoint directory, or model.preset=tiny")
    directory = Path(model.path)
    if not directory.exists():
        return preset_config("llm1"), f"{directory} is not here: planned for the released dots.llm1"
    base = adapter_base(directory) or directory
    if not (base / "config.json").is_file():
        raise ValueError(f"{directory}: not a checkpoint directory: it has no config.json")
    return Dots1Config.from_pretrained(base, local_files_only=True), str(base)


def check_plannable(recipe: Any) -> None:
    """Raises ValueError for a recipe that no plan can be made for."""
    if recipe.stage not in _LOADS:
        raise ValueError(f"stage {recipe.stage} has no plan; give a recipe of stage {', '.join(_LOADS)}")
    if recipe.parallel.backend != "fsdp":
        raise ValueError(f"parallel.backend={recipe.parallel.backend} has no plan; plan with parallel.backend=fsdp")
    if recipe.model.experts_implementation != "grouped":
        raise ValueError(
            f"model.experts_implementation={recipe.model.experts_implementation} has no plan; set it to grouped"
        )
    if recipe.model.attn_implementation == "eager":
        raise ValueError("model.attn_implementation=eager has no plan; it keeps every score: set it to packed")


def load_of(recipe: Any, config: Dots1Config, launch: Launch, prompt_tokens: int) -> Load:
    """What the recipe makes one process of the launch do."""
    return _LOADS[recipe.stage](recipe, config, launch, prompt_tokens)


def _batch(recipe: Any, config: Any, tokens: int, scored: int) -> MicroBatch:
    ep = recipe.parallel.ep
    sent = tokens * config.num_experts_per_tok
    packs = recipe.model.attn_implementation == "packed"
    return MicroBatch(
        tokens=tokens,
        scored=scored,
        attended=int(tokens * PADDING) if packs else tokens,
        sent=sent,
        received=int(sent * BUSIEST) if ep > 1 else sent,
        itemsize=2 if recipe.train.bf16 or recipe.model.dtype == "bfloat16" else 4,
        exchanged=ep > 1,
    )


def _evaluates(recipe: Any) -> bool:
    return any(section.hook == "evaluate" and section.in_trainer for section in recipe.on_save)


def _evaluation(recipe: Any, launch: Launch, prompt_tokens: int) -> RolloutBatch | None:
    """What the `evaluate` hook samples on each process."""
    if not _evaluates(recipe) or recipe.stage == "reward_model":
        return None
    prompts = -(-recipe.evaluation.num_prompts // launch.processes)
    at_once = min(prompts, inspect.signature(RolloutEngine).parameters["max_num_sequences"].default)
    return RolloutBatch(at_once, 1, prompt_tokens, recipe.evaluation.max_tokens)


def _work(recipe: Any, launch: Launch, prompt_tokens: int, batch: MicroBatch, accumulates: bool, **more: Any) -> Work:
    return Work(
        batch,
        checkpointing=recipe.train.gradient_checkpointing,
        accumulates=accumulates,
        offload=recipe.parallel.offload_optimizer,
        reshard=recipe.parallel.reshard_after_forward,
        mixed=recipe.train.bf16,
        evaluation=_evaluation(recipe, launch, prompt_tokens),
        **more,
    )


def _supervised(recipe: Any, config: Any, launch: Launch, prompt_tokens: int, sequences: int = 1) -> Load:
    train = recipe.train
    tokens = sequences * train.per_device_train_batch_size * train.max_length
    batches = train.gradient_accumulation_steps
    work = _work(recipe, launch, prompt_tokens, _batch(recipe, config, tokens, tokens), batches > 1)
    return Load(work, batches, 0, 1, 0, tokens * batches * launch.processes, train.max_length)


def _pairs(recipe: Any, config: Any, launch: Launch, prompt_tokens: int) -> Load:
    """A chosen and a rejected answer each; the reference's log-probabilities are computed once, before training."""
    return _supervised(recipe, config, launch, prompt_tokens, sequences=2)


def _scored_pairs(recipe: Any, config: Any, launch: Launch, prompt_tokens: int) -> Load:
    """Of each answer only the last token goes through the head."""
    load = _pairs(recipe, config, launch, prompt_tokens)
    sequences = 2 * recipe.train.per_device_train_batch_size
    pairs = -(-recipe.evaluation.num_pairs // launch.processes) if _evaluates(recipe) else 0
    reading = min(EVALUATION_TOKENS, 2 * pairs * recipe.train.max_length)
    work = replace(
        load.work,
        batch=replace(load.work.batch, scored=sequences),
        scalar_head=True,
        scoring=_batch(recipe, config, reading, 0) if pairs else None,
    )
    return replace(load, work=work)


def _sampled_first(recipe: Any, config: Any, launch: Launch, prompt_tokens: int) -> Load:
    """RFT: SFT, and before it a rollout of all prompts, whose time is not a step's."""
    load, keys = _supervised(recipe, config, launch, prompt_tokens), recipe.rollout
    width = min(keys.group_size, keys.max_num_sequences)
    at_once = max(keys.max_num_sequences // width, 1)
    before = RolloutBatch(at_once, width, prompt_tokens, keys.max_tokens)
    return replace(load, work=replace(load.work, before=before))


def critic_load(recipe: Any, config: Any, launch: Launch, prompt_tokens: int) -> Load:
    """The critic of PPO reads what the policy trains on: once for its values, then in every update. All tokens go
    through its head.
    """
    load, train = _reinforced(recipe, config, launch, prompt_tokens), recipe.train
    batch = replace(load.work.batch, scored=load.work.batch.tokens)
    work = replace(load.work, batch=batch, copies=1, rollout=None, evaluation=None, scalar_head=True)
    return replace(load, work=work, inferences=load.forwards // train.num_epochs, waves=0)


def _reinforced(recipe: Any, config: Any, launch: Launch, prompt_tokens: int) -> Load:
    train, keys = recipe.train, recipe.rollout
    longest = prompt_tokens + keys.max_tokens
    groups = -(-train.num_prompts_per_step // launch.processes)
    own_tokens = groups * keys.group_size * longest
    update_tokens = -(-own_tokens // train.num_minibatches)
    tokens = min(max(train.micro_batch_tokens, longest), update_tokens)
    batches = -(-update_tokens // tokens)
    width = min(keys.group_size, keys.max_num_sequences)
    blocks = groups * -(-keys.group_size // width)
    at_once = min(max(keys.max_num_sequences // width, 1), blocks)
    work = _work(
        recipe,
        launch,
        prompt_tokens,
        _batch(recipe, config, tokens, tokens * keys.max_tokens // longest),
        batches > 1,
        copies=2 if recipe.algorithm.kl_coef and recipe.lora is None else 1,
        rollout=RolloutBatch(at_once, width, prompt_tokens, keys.max_tokens),
    )
    updates = train.num_minibatches * train.num_epochs
    inferences = (int(updates > 1) + int(recipe.algorithm.kl_coef > 0)) * batches * train.num_minibatches
    step_tokens = train.num_prompts_per_step * keys.group_size * longest
    return Load(work, batches * updates, inferences, updates, -(-blocks // at_once), step_tokens, longest)


_LOADS: dict[str, Callable[..., Load]] = {
    "sft": _supervised,
    "rft": _sampled_first,
    "dpo": _pairs,
    "reward_model": _scored_pairs,
    "grpo": _reinforced,
    "ppo": _reinforced,
}
