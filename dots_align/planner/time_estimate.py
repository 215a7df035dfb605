"""How long a step takes: bytes that travel, exactly, and seconds, as an estimate from stated rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dots_align.planner.hardware import ACHIEVED, Gpu
from dots_align.planner.memory import MemoryModel
from dots_align.planner.shards import Group, Shards
from dots_align.planner.work import Launch, Load


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in one step, before any part of them is found to be its own: routed rows (`exchange`:
    tokens times k, each way, in every pass over every MoE layer), gathered weights, reduced gradients.
    """

    exchange: int
    gather: int
    reduce: int


@dataclass(frozen=True)
class Seconds:
    """Of one step, on one kind of GPU. `weights_exposed` is what of the weights' traffic computing does not cover."""

    compute: float
    exchange: float
    weights: float
    weights_exposed: float
    optimizer: float
    rollout: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.weights_exposed + self.optimizer + self.rollout


class TimeModel:
    """Traffic and time of the steps of a load on a launch."""

    def __init__(self, config: Any, shards: Shards, memory: MemoryModel, load: Load, launch: Launch, ep: int) -> None:
        self.config, self.shards, self.memory, self.load = config, shards, memory, load
        self.launch, self.ep = launch, ep

    # --------------------------------------------------------------------------------------------------- traffic

    def traffic(self) -> Traffic:
        rows = self._row_bytes()
        return Traffic(
            exchange=rows * (self._crossings() * self.load.forwards + 2 * self.load.inferences),
            gather=sum(
                self._gathers(g) * self.memory.gathered(g) * (g.ranks - 1) // g.ranks for g in self.shards.groups
            ),
            reduce=sum(self._reduced(g) for g in self.shards.groups) * self.load.updates,
        )

    def _row_bytes(self) -> int:
        """Routed rows of one forward, of all MoE layers, one way."""
        batch = self.load.work.batch
        layers = sum(1 for g in self.shards.groups if g.kind == "experts")
        return batch.sent * self.config.hidden_size * batch.itemsize * layers if batch.exchanged else 0

    def _crossings(self) -> int:
        """There and back, forward and backward; and forward once more where it is recomputed."""
        return 6 if self.load.work.checkpointing else 4

    def _gathers(self, group: Group) -> int:
        """How often a step gathers a group: forward and again in backward, unless it is kept."""
        kept = group.kind in ("router", "head") or not self.load.work.reshard
        rollouts = 1 if self.load.work.rollout is not None else 0
        return self.load.forwards * (1 if kept else 2) + self.load.inferences + rollouts

    def _reduced(self, group: Group) -> int:
        scattered = self.memory.reduce_buffer(group) * (group.ranks - 1) // group.ranks
        own = self.memory.reduce_buffer(group) // group.ranks
        return scattered + 2 * own * (group.replicas - 1) // group.replicas

    # ---------------------------------------------------------------------------------------------------- seconds

    def seconds(self, gpu: Gpu) -> Seconds:
        compute = self._compute(gpu)
        weights = self._weights(gpu)
        return Seconds(
            compute=compute,
            exchange=self._exchange(gpu),
            weights=weights,
            weights_exposed=max(0.0, weights - compute),
            optimizer=self._optimizer(gpu),
            rollout=self._rollout(gpu),
        )

    def token_flops(self) -> float:
        """Of one token's forward: its active parameters, and attention to half of the longest sequence."""
        config = self.config
        embedding = config.vocab_size * config.hidden_size
        attention = 2 * self.load.longest * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        return 2.0 * (self.shards.active - embedding) + attention

    def _compute(self, gpu: Gpu) -> float:
        """Backward costs two forwards, under adapters one: frozen weights get no gradient. Recomputing costs one."""
        batch, work = self.load.work.batch, self.load.work
        passes = (2 if self.shards.adapter else 3) + (1 if work.checkpointing else 0)
        forwards = passes * self.load.forwards + self.load.inferences
        peak = gpu.bf16 if batch.itemsize == 2 else gpu.fp32
        return forwards * batch.tokens * self.token_flops() / (peak * ACHIEVED.products)

    def _exchange(self, gpu: Gpu) -> float:
        sent = self.traffic().exchange
        inside = min(self.ep, self.launch.gpus_per_node)
        over_nvlink, over_network = sent * (inside - 1) / self.ep, sent * (self.ep - inside) / self.ep
        return over_nvlink / (gpu.nvlink * ACHIEVED.nvlink) + over_network / (gpu.infiniband * ACHIEVED.infiniband)

    def _weights(self, gpu: Gpu) -> float:
        total = 0.0
        for group in self.shards.groups:
            gathered = self._gathers(group) * self.memory.gathered(group)
            reduced = self.load.updates * self.memory.reduce_buffer(group)
            total += self._collective(gpu, group, gathered + reduced)
            own = 2 * reduced / group.ranks * (group.replicas - 1) / group.replicas
            total += own / (gpu.infiniband * ACHIEVED.infiniband)
        return total

    def _collective(self, gpu: Gpu, group: Group, size: float) -> float:
        """Gathering or scattering `size` bytes over a group's ranks: within a node over NVLink, between nodes over the
        adapters of the ranks that lie in one.
        """
        neighbours = self.launch.gpus_per_node
        if group.kind == "experts":
            neighbours = max(neighbours // self.ep, 1)
        inside = min(group.ranks, neighbours)
        nodes = group.ranks / inside
        over_nvlink = size * (inside - 1) / inside
        over_network = size * (nodes - 1) / nodes / inside
        return max(over_nvlink / (gpu.nvlink * ACHIEVED.nvlink), over_network / (gpu.infiniband * ACHIEVED.infiniband))

    def _optimizer(self, gpu: Gpu) -> float:
        """AdamW reads and writes moments, masters and weights once: 28 bytes and the weights' own."""
        trained = self.shards.trained_elements * self.load.updates
        if not self.load.work.offload:
            return 32 * trained / (gpu.hbm * ACHIEVED.hbm)
        crossing = (4 + 4) * trained / ACHIEVED.host_copy
        return crossing + 28 * trained * self.launch.gpus_per_node / ACHIEVED.host_memory

    def _rollout(self, gpu: Gpu) -> float:
        """Each decoding step reads all gathered weights and half of the cache."""
        if self.load.work.rollout is None:
            return 0.0
        moment = self.memory.phases()["rollout"]
        read = moment["gathered weights"] + moment["KV cache"] / 2
        step = read / (gpu.hbm * ACHIEVED.hbm) + self.config.num_hidden_layers * ACHIEVED.launch
        return self.load.waves * self.load.work.rollout.max_tokens * step
