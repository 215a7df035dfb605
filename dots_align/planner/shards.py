"""What every process holds of a model: the real model, built on meta and sharded by the real code over processes that
exist in name only. Nothing is allocated, so 142.8 B parameters take seconds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Dots1Config, Dots1ForCausalLM

from dots_align.config import LoraSection, OptimSection, ParallelSection
from dots_align.model.dots1 import count_parameters
from dots_align.model.expert_parallel import check_layout, shard_model
from dots_align.model.experts import IMPLEMENTATION, local
from dots_align.model.heads import attach_scalar_head
from dots_align.model.lora import add_adapter
from dots_align.model.optimizer import make_optimizer
from dots_align.model.router import keep_router_in_fp32


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered, used and given back together, as one process sees them.

    `kind` is `embedding`, `layer` (but for its experts and router), `experts`, `router` or `head` (with the final
    norm); `ranks` the processes among which they are split, `replicas` the copies. Of this process's part: `elements`,
    `bytes`, the `managed` elements that FSDP2 gathers (of a process alone none), and of those that are trained
    `trained` and `trained_bytes`; `optimizer_bytes` the moments and masters.
    """

    kind: str
    layer: int
    ranks: int
    replicas: int
    elements: int
    bytes: int
    managed: int
    trained: int
    trained_bytes: int
    optimizer_bytes: int

    @property
    def whole(self) -> int:
        """Elements after gathering (of the experts: of this process's own ones)."""
        return self.managed * self.ranks

    @property
    def whole_trained(self) -> int:
        return self.trained * self.ranks


@dataclass(frozen=True)
class Shards:
    """The first process's part of a model: the largest one, where sizes do not divide evenly.

    `parameters` and `active` count the base model; `adapter` what LoRA adds. `trained` names what is trained, by the
    last parts of its path (`self_attn.q_proj`, `mlp.experts.down_proj`).
    """

    groups: tuple[Group, ...]
    parameters: int
    active: int
    adapter: int
    trained: frozenset[str]

    @cached_property
    def bytes(self) -> int:
        return sum(g.bytes for g in self.groups)

    @cached_property
    def gradient_bytes(self) -> int:
        return sum(g.trained_bytes for g in self.groups)

    @cached_property
    def trained_elements(self) -> int:
        return sum(g.trained for g in self.groups)

    def optimizer_bytes(self, offload: bool) -> int:
        """Of moments and masters; offloaded, everything that is trained has a master."""
        return 12 * self.trained_elements if offload else sum(g.optimizer_bytes for g in self.groups)

    @cached_property
    def _index(self) -> dict[tuple[str, int], Group]:
        return {(g.kind, g.layer): g for g in self.groups}

    def of(self, kind: str, layer: int = -1) -> Group | None:
        """The group of that kind and layer; -1 where there are no layers."""
        return self._index.get((kind, layer))


def shards_of_few_layers(config: Dots1Config, *arguments: Any) -> Shards:
    """`shards_of` from the first MoE layer and those before it; the others are like it. `parameters`, `active` and
    `adapter` count the built layers only.
    """
    depth, dense = _number(config.num_hidden_layers), _number(config.first_k_dense_replace)
    built = min(dense + 1, depth)
    short = copy.deepcopy(config)
    short.num_hidden_layers, short.layer_types = built, list(config.layer_types or ())[:built]
    shards = shards_of(short, *arguments)
    last = [g for g in shards.groups if g.layer == built - 1]
    more = [replace(g, layer=layer) for layer in range(built, depth) for g in last]
    return replace(shards, groups=(*shards.groups, *more))


@contextmanager
def imagined_processes(count: int) -> Iterator[None]:
    """A process group in which this process is the first of `count` and nobody answers."""
    assert not dist.is_initialized(), "a plan is made outside of a launch"
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def shards_of(
    config: Dots1Config,
    parallel: ParallelSection,
    world_size: int,
    dtype: str,
    bf16: bool,
    lora: LoraSection | None,
    scalar_head: bool = False,
) -> Shards:
    """Builds and shards the model of `config` over `world_size` processes.

    Args:
        dtype: of the parameters. bf16: whether they are gathered in bfloat16. scalar_head: it is a critic or a reward
            model.

    Raises:
        ValueError: the layout is impossible, or `lora` names what is not there.
    """
    check_layout(parallel, world_size, _number(config.n_routed_experts))
    model: Any = _empty_model(config, dtype)
    if scalar_head:
        attach_scalar_head(model)
    parameters, active = count_parameters(model)
    if lora is not None:
        model = add_adapter(model, lora, "")
    adapter = sum(p.numel() for p in model.parameters()) - parameters
    with imagined_processes(world_size):
        if world_size > 1 or bf16:  # a process alone keeps its model whole, unless it computes in another dtype
            shard_model(model, parallel, torch.bfloat16 if bf16 else None, "cpu")
        groups = _groups(model)
        trained = frozenset(_role(name) for name, p in model.named_parameters() if p.requires_grad)
    return Shards(groups, parameters, active, adapter, trained)


def _number(value: int | None) -> int:
    """A field of a configuration, which transformers declares optional."""
    assert value is not None
    return value


def _empty_model(config: Dots1Config, dtype: str) -> Dots1ForCausalLM:
    config._experts_implementation = IMPLEMENTATION
    with torch.device("meta"):
        model = Dots1ForCausalLM(config)
    keep_router_in_fp32(model)
    model.to(getattr(torch, dtype))  # pyright: ignore[reportArgumentType]
    return model


def _groups(model: Any) -> tuple[Group, ...]:
    named = list(model.named_parameters())
    optimizer = make_optimizer(named, OptimSection(), offload=False)
    members: dict[tuple[str, int], list[torch.Tensor]] = {}
    for name, parameter in named:
        members.setdefault(_place(name), []).append(parameter)
    return tuple(_group(kind, layer, parts, optimizer) for (kind, layer), parts in members.items())


def _group(kind: str, layer: int, parameters: list[Any], optimizer: Any) -> Group:
    trained = [p for p in parameters if p.requires_grad]
    managed = [p for p in parameters if "dp_shard" in _mesh_sizes(p)]
    sizes = _mesh_sizes(managed[0]) if managed else {}
    states = [t for p in trained for key, t in optimizer.state_of(p).items() if key != "step"]
    return Group(
        kind,
        layer,
        sizes.get("dp_shard", 1),
        sizes.get("dp_replicate", 1),
        sum(local(p).numel() for p in parameters),
        sum(local(p).nbytes for p in parameters),
        sum(local(p).numel() for p in managed),
        sum(local(p).numel() for p in trained),
        sum(local(p).nbytes for p in trained),
        sum(t.nbytes for t in states),
    )


def _mesh_sizes(parameter: torch.Tensor) -> dict[str, int]:
    if not isinstance(parameter, DTensor):
        return {}
    mesh = parameter.device_mesh
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def _place(name: str) -> tuple[str, int]:
    """Group and layer of a parameter, by its name."""
    if found := re.search(r"\.layers\.(\d+)\.(.*)", name):
        layer, rest = int(found[1]), found[2]
        kind = "experts" if rest.startswith("mlp.experts.") else "router" if rest.startswith("mlp.gate.") else "layer"
        return kind, layer
    return ("embedding" if "embed_tokens" in name else "head"), -1


def _role(name: str) -> str:
    """`…layers.3.mlp.experts.lora.lora_A.default.down_proj` -> `mlp.experts.down_proj`"""
    path = re.sub(r"^.*\.layers\.\d+\.|^base_model\.model\.|^model\.|\.weight$", "", name)
    path = re.sub(r"\.lora_[AB]\.default$", "", path)
    return re.sub(r"\.lora\.lora_[AB]\.default\b", "", path)
