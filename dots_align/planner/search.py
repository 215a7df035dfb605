"""The nearest layout that fits: the fewest and mildest changes of a recipe, by trying them in order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dots_align.config import recipe_dict
from dots_align.planner.hardware import Gpu
from dots_align.planner.parts import parts_of, phases_of
from dots_align.planner.shards import Shards, shards_of_few_layers
from dots_align.planner.work import Launch

MOST_NODES = 16
SHORTEST = 1024  # tokens: no sequence and no forward is cut below
LORA = {
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@dataclass(frozen=True)
class Option:
    """A change of some keys or of the number of nodes; `cost` says how much one would rather not."""

    cost: float = 0.0
    keys: dict[str, Any] = field(default_factory=dict)
    nodes: int | None = None


@dataclass(frozen=True)
class Suggestion:
    """`overrides` to paste, and the launch they are for."""

    overrides: tuple[str, ...]
    recipe: Any
    launch: Launch


class Search:
    """Looks for layouts of one recipe.

    Args:
        config: of the model. prompt_tokens: the longest prompt of a rollout.
    """

    def __init__(self, recipe: Any, config: Any, launch: Launch, prompt_tokens: int) -> None:
        self.recipe, self.config, self.launch, self.prompt_tokens = recipe, config, launch, prompt_tokens
        self._shards: dict[str, Shards | ValueError] = {}

    def nearest(self, gpu: Gpu) -> Suggestion | None:
        """The cheapest combination of changes that fits, or None if none does."""
        combinations = itertools.product(*self._options())
        for options in sorted(combinations, key=lambda chosen: sum(option.cost for option in chosen)):
            nodes = next((option.nodes for option in options if option.nodes), self.launch.nodes)
            keys = {key: value for option in options for key, value in option.keys.items()}
            launch = Launch(nodes, self.launch.gpus_per_node)
            recipe = changed(self.recipe, keys)
            if self._fits(recipe, launch, gpu):
                return Suggestion(tuple(_override(*item) for item in keys.items()), recipe, launch)
        return None

    def _fits(self, recipe: Any, launch: Launch, gpu: Gpu) -> bool:
        try:
            parts = parts_of(recipe, self.config, launch, self.prompt_tokens, self._build)
        except ValueError:  # an impossible layout
            return False
        if sum(sum(part.memory.always.values()) for part in parts) > gpu.usable:
            return False
        return max(sum(moment.values()) for moment in phases_of(parts).values()) <= gpu.usable

    def _build(self, config: Any, parallel: Any, *layout: Any) -> Shards:
        """`shards_of_few_layers`, once for each layout."""
        key = repr((config.hidden_size, config.num_hidden_layers, parallel.ep, parallel.dp_replicate, *layout))
        if key not in self._shards:
            try:
                self._shards[key] = shards_of_few_layers(config, parallel, *layout)
            except ValueError as error:
                self._shards[key] = error
        found = self._shards[key]
        if isinstance(found, ValueError):
            raise found
        return found

    def _options(self) -> list[list[Option]]:
        """For each thing that can be changed, what it can become; the first of each is: as it is."""
        recipe = self.recipe
        switches = [
            ("train.gradient_checkpointing", recipe.train.gradient_checkpointing, True, 1.0),
            ("train.bf16", recipe.train.bf16, True, 1.0),
            ("model.dtype", recipe.model.dtype, "bfloat16", 2.0),
            ("parallel.offload_optimizer", recipe.parallel.offload_optimizer, True, 2.0),
        ]
        options = [[Option(), Option(cost, {key: wanted})] for key, found, wanted, cost in switches if found != wanted]
        options += [self._expert_parallel(), self._nodes(), *self._sizes()]
        if recipe.lora is None:
            options.append([Option(), Option(8.0, LORA)])
        return options

    def _expert_parallel(self) -> list[Option]:
        gpus, experts = self.launch.gpus_per_node, self.config.n_routed_experts
        sizes = [n for n in range(gpus, 0, -1) if gpus % n == 0 and experts % n == 0 and n != self.recipe.parallel.ep]
        return [Option(), *(Option(1.0, {"parallel.ep": n}) for n in sizes)]

    def _nodes(self) -> list[Option]:
        doubled = itertools.takewhile(lambda n: n <= MOST_NODES, (self.launch.nodes * 2**i for i in itertools.count(1)))
        return [Option(), *(Option(3.0 + 2 * i, nodes=n) for i, n in enumerate(doubled))]

    def _sizes(self) -> Iterator[list[Option]]:
        """Smaller batches; of RL, smaller pieces of the same batch."""
        train = self.recipe.train
        if (rollout := getattr(self.recipe, "rollout", None)) is not None:
            yield _halved("rollout.max_num_sequences", rollout.max_num_sequences, rollout.group_size, 0.5)
        if hasattr(train, "micro_batch_tokens"):
            yield _halved("train.micro_batch_tokens", train.micro_batch_tokens, SHORTEST, 0.5)
            return
        if train.gradient_accumulation_steps > 1:
            yield [Option(), Option(2.0, {"train.gradient_accumulation_steps": 1})]
        yield _halved("train.per_device_train_batch_size", train.per_device_train_batch_size, 1, 1.5)
        yield _halved("train.max_length", train.max_length, SHORTEST, 2.5)


def _halved(key: str, value: int, least: int, cost: float) -> list[Option]:
    found = [Option()]
    while value // 2 >= least:
        value //= 2
        found.append(Option(found[-1].cost + cost, {key: value}))
    return found


def _override(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def changed(recipe: Any, keys: dict[str, Any]) -> Any:
    """The recipe with dotted keys set, validated again."""
    values = recipe_dict(recipe)
    for key, value in keys.items():
        *sections, name = key.split(".")
        here = values
        for section in sections:
            if here.get(section) is None:
                here[section] = {}
            here = here[section]
        here[name] = value
    return type(recipe).model_validate(values)
