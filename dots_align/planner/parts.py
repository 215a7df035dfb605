"""The models that a recipe trains, each with its shards, its work and its memory, and what is alive where they share a
GPU: PPO has a critic beside its policy, every other stage has one model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dots_align.planner.memory import CATEGORIES, Bytes, MemoryModel
from dots_align.planner.shards import Shards
from dots_align.planner.work import Launch, Load, critic_load, load_of, model_config

# From (config, parallel, processes, dtype, bf16, lora, whether the head gives one number) to a process's part.
BuildShards = Callable[..., Shards]


@dataclass(frozen=True)
class Part:
    """One of the models; `name` is empty for the one that the stage is about."""

    name: str
    config: Any
    shards: Shards
    load: Load
    memory: MemoryModel


def parts_of(recipe: Any, config: Any, launch: Launch, prompt_tokens: int, build: BuildShards) -> list[Part]:
    """The model of the recipe, of shape `config`, and the critic, if there is one.

    Raises:
        ValueError: the layout is impossible.
    """
    layout = (recipe.parallel, launch.processes, recipe.model.dtype, recipe.train.bf16)

    def part(name: str, config: Any, lora: Any, load: Load) -> Part:
        shards = build(config, *layout, lora, load.work.scalar_head)
        return Part(name, config, shards, load, MemoryModel(config, shards, load.work))

    found = [part("", config, recipe.lora, load_of(recipe, config, launch, prompt_tokens))]
    if recipe.stage == "ppo":
        path = recipe.critic.path
        own = (
            config if path is None else model_config(recipe.model.model_copy(update={"path": path, "preset": None}))[0]
        )
        found.append(part("critic", own, None, critic_load(recipe, own, launch, prompt_tokens)))
    return found


def phases_of(parts: list[Part]) -> dict[str, Bytes]:
    """The worst moment of each phase; while one model works, the others' parameters and optimizer states lie there."""
    found = {}
    for part in parts:
        others = [other.memory.always for other in parts if other is not part]
        for name, moment in part.memory.phases().items():
            whole = {c: moment[c] + sum(other.get(c, 0) for other in others) for c in CATEGORIES}
            found[f"{part.name} {name}".strip()] = whole
    return found
