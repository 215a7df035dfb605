"""One plan: a recipe on a launch, its memory phase by phase, its traffic and time, and where it fits."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from transformers import Dots1Config

from dots_align.planner.hardware import GPUS, PROCESS_HOST_BYTES, Gpu
from dots_align.planner.memory import Bytes
from dots_align.planner.parts import BuildShards, parts_of, phases_of
from dots_align.planner.shards import Shards, shards_of
from dots_align.planner.time_estimate import Seconds, TimeModel, Traffic
from dots_align.planner.work import Launch, Load


@dataclass(frozen=True)
class Plan:
    """`phases`: bytes by category of the worst moment of each. `host_bytes` of one node. `seconds` by GPU's name.
    `critic` is what a process holds of PPO's.
    """

    recipe: Any
    launch: Launch
    shards: Shards
    load: Load
    phases: dict[str, Bytes]
    host_bytes: int
    traffic: Traffic
    seconds: dict[str, Seconds]
    critic: Shards | None = None

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
    parts = parts_of(recipe, config, launch, prompt_tokens, build)
    times = [TimeModel(p.config, p.shards, p.memory, p.load, launch, recipe.parallel.ep) for p in parts]
    host = sum(part.memory.host_bytes() for part in parts)
    return Plan(
        recipe,
        launch,
        parts[0].shards,
        parts[0].load,
        phases_of(parts),
        launch.gpus_per_node * (host + PROCESS_HOST_BYTES),
        _added([time.traffic() for time in times]),
        {gpu.name: _added([time.seconds(gpu) for time in times]) for gpu in GPUS},
        parts[1].shards if len(parts) > 1 else None,
    )


def _added(values: list[Any]) -> Any:
    """The sum, field by field: one model works after the other."""
    return type(values[0])(*(sum(column) for column in zip(*map(astuple, values), strict=True)))
