"""One plan: a recipe on a launch, its memory phase by phase, its traffic and time, and where it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Dots1Config

from dots_align.planner.hardware import GPUS, PROCESS_HOST_BYTES, Gpu
from dots_align.planner.memory import Bytes, MemoryModel
from dots_align.planner.shards import Shards, shards_of
from dots_align.planner.time_estimate import Seconds, TimeModel, Traffic
from dots_align.planner.work import Launch, Load, load_of

BuildShards = Callable[..., Shards]


@dataclass(frozen=True)
class Plan:
    """`phases`: bytes by category of the worst moment of each. `host_bytes` of one node. `seconds` by GPU's name."""

    recipe: Any
    launch: Launch
    shards: Shards
    load: Load
    phases: dict[str, Bytes]
    host_bytes: int
    traffic: Traffic
    seconds: dict[str, Seconds]

    @property
    def worst_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.worst_phase].values())

    @property
    def largest(self) -> str:
        """The category that takes most where memory peaks."""
        return max(self.phases[self.worst_phase], key=lambda c: self.phases[self.worst_phase][c])

    def fits(self, gpu: Gpu) -> bool:
        return self.peak <= gpu.usable


def make_plan(
    recipe: Any, config: Dots1Config, launch: Launch, prompt_tokens: int, build: BuildShards = shards_of
) -> Plan:
    """Plans a recipe's step.

    Args:
        config: of the model. prompt_tokens: the longest prompt of a rollout. build: makes the shards.

    Raises:
        ValueError: the layout is impossible.
    """
    shards = build(config, recipe.parallel, launch.processes, recipe.model.dtype, recipe.train.bf16, recipe.lora)
    load = load_of(recipe, config, launch, prompt_tokens)
    memory = MemoryModel(config, shards, load.work)
    time = TimeModel(config, shards, memory, load, launch, recipe.parallel.ep)
    return Plan(
        recipe,
        launch,
        shards,
        load,
        memory.phases(),
        launch.gpus_per_node * (memory.host_bytes() + PROCESS_HOST_BYTES),
        time.traffic(),
        {gpu.name: time.seconds(gpu) for gpu in GPUS},
    )
