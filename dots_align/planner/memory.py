"""The most that is alive at once on one process, phase by phase.

A training step peaks at its head (logits, and everything kept from forward to backward), while a layer's backward runs
(its gathered weights, its recomputed activations, gradients before and after they are reduced), or in the optimizer; RL
also in the rollout, when all weights are gathered beside the cache. Each phase is a few moments; the worst one counts.

tests/distributed/test_planner_memory.py compares this with what real steps have alive, on 1, 2 and 4 CPU processes:
parameters, gradients and optimizer states are equal to the byte; the peaks of training steps were off by -3.5 to +3.5 %
(fp32 and bf16, with and without checkpointing, accumulation, replicas, offload and LoRA; one phase that is not the peak
by -19 %), those of rollouts by +1 to +7 %. It counts tensors: what kernels take for themselves, and the allocator's
fragments, are in the reserve of `hardware`. No GPU has been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dots_align.planner.activations import (
    LayerMemory,
    MicroBatch,
    dense_layer,
    head,
    kept_logits,
    logits_chunk,
    moe_layer,
)
from dots_align.planner.shards import Group, Shards
from dots_align.rollout.kv_cache import block_size

# What a process's memory is spent on, in the order of the table.
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "gathered weights",
    "gradient buffers",
    "activations",
    "logits",
    "KV cache",
)
Bytes = dict[str, int]


@dataclass(frozen=True)
class RolloutBatch:
    """What a process samples at once: `groups` prompts of up to `prompt_tokens`, `group_size` responses each of up to
    `max_tokens`.
    """

    groups: int
    group_size: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Work:
    """What memory depends on beside the shards.

    `accumulates`: several forwards before gradients are reduced. `mixed`: gathered in bf16, reduced in fp32.
    `copies`: models of this size, 2 with a reference of its own. `rollout`: what is sampled in every step, `before`:
    before there is an optimizer. `evaluation`: what the `evaluate` hook samples, from a further copy; `scoring`: what
    it reads, if the model is a reward model. `scalar_head`: it gives one number, as a critic does. `on_cpu`: CPUs have
    no product of bf16 that sums in fp32, and copy.
    """

    batch: MicroBatch
    checkpointing: bool
    accumulates: bool
    offload: bool
    reshard: bool
    mixed: bool
    copies: int = 1
    rollout: RolloutBatch | None = None
    before: RolloutBatch | None = None
    evaluation: RolloutBatch | None = None
    scoring: MicroBatch | None = None
    scalar_head: bool = False
    on_cpu: bool = False


class MemoryModel:
    """Bytes of each phase of a step, by category.

    Args:
        config: of the model. shards: what one process holds. work: what it does.
    """

    def __init__(self, config: Any, shards: Shards, work: Work) -> None:
        self.config, self.shards, self.work = config, shards, work
        dense, moe = (self._layer(count, work.batch) for count in (dense_layer, moe_layer))
        self.layers = [moe if self._experts(i) else dense for i in self._depths()]
        self.head = head(config, work.batch, shards.trained, work.scalar_head)
        self.always = {
            "parameters": work.copies * shards.bytes,
            "optimizer": 0 if work.offload else shards.optimizer_bytes(offload=False),
        }

    def phases(self) -> dict[str, Bytes]:
        """The worst moment of each phase."""
        found = {"forward": self._forward(), "backward": self._backward(), "optimizer": self._optimizer()}
        if self.work.rollout is not None:
            found = {"rollout": self._sampling(self.work.rollout), **found}
        if self.work.before is not None:
            alone = {"parameters": self.shards.bytes, "optimizer": 0}
            found = {"rollout": {**self._sampling(self.work.before), **alone}, **found}
        if self.work.scoring is not None:
            reading = self._reading(self.work.scoring)
            found["evaluate"] = {**reading, "parameters": reading["parameters"] + self.shards.bytes}
        if self.work.evaluation is not None:
            evaluation = self._sampling(self.work.evaluation)
            found["evaluate"] = {**evaluation, "parameters": evaluation["parameters"] + self.shards.bytes}
        return {name: {c: moment.get(c, 0) for c in CATEGORIES} for name, moment in found.items()}

    def host_bytes(self) -> int:
        """Of offloaded states, and the gradients on their way to them."""
        return (12 + 4) * self.shards.trained_elements if self.work.offload else 0

    # ---------------------------------------------------------------------------------------------------- phases

    def _forward(self) -> Bytes:
        """In the last layer's experts, or at the logits, whose entropy takes a second chunk."""
        last, group = len(self.layers) - 1, self._group("head")
        accumulated = self._accumulated(last + 1) + (self.reduce_buffer(group) if self.work.accumulates else 0)
        waiting = self._left_gathered(last + 1)
        running = sum(map(self.gathered, (self._group("layer", last), self._experts(last))))
        moments = [
            self._moment(
                gathered=running + self._buffer(self._experts(last)) + waiting,
                unreduced=accumulated,
                activations=self._kept(last) + self.layers[last].in_forward,
            ),
            self._moment(
                gathered=self.gathered(group) + self._buffer(group) + waiting,
                unreduced=accumulated,
                activations=self._kept(last) + self.head,
                logits=self._logits(2),
            ),
        ]
        return max(moments, key=lambda moment: sum(moment.values()))

    def _backward(self) -> Bytes:
        moments = [self._head_backward(), self._embedding_backward()]
        for layer in {0, self._first_moe(), len(self.layers) - 1}:
            moments += self._layer_backward(layer)
        return max(moments, key=lambda moment: sum(moment.values()))

    def _head_backward(self) -> Bytes:
        """The head's gradient is summed in fp32 over the chunks, then cast, then reduced."""
        group, size, batch = self._group("head"), self.work.batch.itemsize, self.work.batch
        chunk = self._logits(1)
        kept = 0 if self.work.scalar_head else kept_logits(self.config, batch)
        own_chunks = chunk + (chunk * size // 4 if size < 4 else 0) + (chunk if size < 4 and self.work.on_cpu else 0)
        in_fp32 = 4 * group.whole_trained
        summing = own_chunks + kept + in_fp32
        reducing = self._reduction(group)
        return self._moment(
            gathered=self.gathered(group) + self._left_gathered(len(self.layers)),
            unreduced=self._accumulated(len(self.layers)) + max(in_fp32, reducing),
            activations=self._kept(len(self.layers) - 1) + self.head + batch.scored * self.config.hidden_size * size,
            logits=max(summing, reducing) - max(in_fp32, reducing),
        )

    def _layer_backward(self, layer: int) -> list[Bytes]:
        """While its experts' gradients are computed; while they are reduced; while those of the rest are."""
        memory, group, experts = self.layers[layer], self._group("layer", layer), self._experts(layer)
        done = self._reduced_after(layer)
        held = self.reduce_buffer(self._group("layer", layer + 1)) if layer + 1 < len(self.layers) else 0
        gathered = self.gathered(group) + self._left_gathered(layer)
        kept = self._kept(layer) + (memory.kept if self.work.checkpointing else 0)
        stream = self._stream()
        own_experts = self.gathered(experts) + (self._buffer(experts) if self.work.checkpointing else 0)
        computing = self._moment(
            gathered=gathered + own_experts,
            gradients=done,
            unreduced=self._accumulated(layer + 1) + held + self._unreduced(experts) // 3,
            activations=kept + memory.in_backward,
        )
        next_layer = self._buffer(self._group("layer", layer - 1)) if layer else 0
        reducing_experts = self._moment(
            gathered=gathered + (self._buffer(experts) if self.work.checkpointing else 0),
            gradients=done,
            unreduced=self._accumulated(layer, "layer", "router") + self._reduction(experts),
            activations=kept - memory.late + 2 * stream,
        )
        reducing_rest = self._moment(
            gathered=gathered + next_layer,
            gradients=done + (experts.trained_bytes if experts else 0),
            unreduced=self._accumulated(layer) + self._reduction(group),
            activations=kept - memory.kept + 2 * stream,
        )
        return [computing, reducing_experts, reducing_rest]

    def _embedding_backward(self) -> Bytes:
        group = self._group("embedding")
        return self._moment(
            gradients=self.shards.gradient_bytes - group.trained_bytes,
            unreduced=self._reduction(group),
            activations=2 * self._stream(),
        )

    def _optimizer(self) -> Bytes:
        """Gradients of parameters in less than fp32 are cast, all at once; offloaded, one after the other."""
        casts = [4 * g.trained for g in self.shards.groups if g.trained_bytes < 4 * g.trained]
        moving = max(casts, default=0) if self.work.offload else sum(casts)
        return self._moment(gradients=self.shards.gradient_bytes, unreduced=moving)

    def _reading(self, batch: MicroBatch) -> Bytes:
        """A forward without gradients: one layer's weights and activations at a time."""
        layer = self._layer(moe_layer, batch)
        last = len(self.layers) - 1
        running = sum(map(self.gathered, (self._group("layer", last), self._experts(last))))
        return self._moment(
            gathered=running + self._buffer(self._experts(last)) + self._left_gathered(last + 1),
            activations=layer.kept + layer.in_forward,
        )

    def _logits(self, chunks: int) -> int:
        return 0 if self.work.scalar_head else chunks * logits_chunk(self.config, self.work.batch)

    def _sampling(self, rollout: RolloutBatch) -> Bytes:
        """All weights are gathered for as long as it takes, beside the cache."""
        prompts, size = self._prompts(rollout), self.work.batch.itemsize
        config, rows = self.config, rollout.groups * rollout.group_size
        block = block_size("cpu" if self.work.on_cpu else "cuda")
        prompt, response = (-(-n // block) * block for n in (rollout.prompt_tokens, rollout.max_tokens))
        cache = (rollout.groups * prompt + rows * response) * config.num_hidden_layers * self._kv_bytes()
        # Sampling: logits in the dtype of computation and fp32, scaled, as probabilities, and their running sum.
        logits = rows * config.vocab_size * (size + 4 * 4)
        experts = size * prompts.received * (config.hidden_size + 3 * config.moe_intermediate_size)
        attention = size * prompts.attended * 4 * config.num_attention_heads * config.head_dim
        decode = 0
        if self.work.on_cpu:
            of_prompts = self._gathered_attention(rollout.groups, rows, prompt)
            attention += self._gathered_attention(rollout.groups, prompts.tokens, prompt)
            decode = max(self._gathered_attention(rows, rows, response), of_prompts)
        prefill = self._layer(moe_layer, prompts).in_forward + max(experts, attention)
        everything = sum(self.gathered(g) for g in self.shards.groups)
        largest = max(self._buffer(g) for g in self.shards.groups)
        return self._moment(
            gathered=everything + largest,
            activations=max(prefill, decode),
            logits=logits,
            cache=cache,
        )

    def _kv_bytes(self) -> int:
        """Keys and values of a token in a layer."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim * self.work.batch.itemsize

    def _gathered_attention(self, segments: int, queries: int, keys: int) -> int:
        """Where there is no flash attention on pages: keys and values are gathered, and one of them copied once more to
        be multiplied; scores are there in two dtypes, and their weights.
        """
        scores = queries * self.config.num_attention_heads * keys * (2 * self.work.batch.itemsize + 4)
        return segments * keys * self._kv_bytes() * 3 // 2 + scores

    # ----------------------------------------------------------------------------------------------------- parts

    def _moment(
        self,
        gathered: int = 0,
        gradients: int = 0,
        unreduced: int = 0,
        activations: int = 0,
        logits: int = 0,
        cache: int = 0,
    ) -> Bytes:
        return {
            **self.always,
            "gradients": gradients,
            "gathered weights": gathered,
            "gradient buffers": unreduced,
            "activations": activations,
            "logits": logits,
            "KV cache": cache,
        }

    def _depths(self) -> range:
        return range(self.config.num_hidden_layers)

    def _first_moe(self) -> int:
        return next((i for i in self._depths() if self._experts(i)), 0)

    def _layer(self, count: Callable[..., LayerMemory], batch: MicroBatch) -> LayerMemory:
        return count(self.config, batch, self.shards.trained)

    def _group(self, kind: str, layer: int = -1) -> Group:
        found = self.shards.of(kind, layer)
        assert found is not None, (kind, layer)
        return found

    def _experts(self, layer: int) -> Group | None:
        return self.shards.of("experts", layer)

    def _prompts(self, rollout: RolloutBatch) -> MicroBatch:
        """All prompts of a rollout in one forward, routed like a training batch."""
        batch, tokens = self.work.batch, rollout.groups * rollout.prompt_tokens
        attended, sent, received = (n * tokens // batch.tokens for n in (batch.attended, batch.sent, batch.received))
        return replace(batch, tokens=tokens, scored=rollout.groups, attended=attended, sent=sent, received=received)

    def _stream(self) -> int:
        """Hidden states between layers, which checkpointing keeps of each."""
        return self.work.batch.tokens * self.config.hidden_size * self.work.batch.itemsize

    def _kept(self, layers: int) -> int:
        """What the first `layers` layers (with that one, if they are not recomputed) hold for their backward."""
        if self.work.checkpointing:
            return (layers + 1) * self._stream()
        return sum(memory.kept for memory in self.layers[: layers + 1])

    def gathered(self, group: Group | None) -> int:
        """A group's whole weights, in the dtype of computation; the router's in its own."""
        if group is None:
            return 0
        own = group.bytes // group.elements
        return group.whole * (own if group.kind == "router" else self.work.batch.itemsize)

    def _buffer(self, group: Group | None) -> int:
        """What a group's all-gather writes to, before the parameters are copied out."""
        return self.gathered(group) if group is not None and group.ranks > 1 else 0

    def _left_gathered(self, layers: int) -> int:
        """Weights that wait for their backward: routers', and everybody's where layers are not given back."""
        waiting = [g for g in self.shards.groups if 0 <= g.layer < layers]
        return sum(self.gathered(g) for g in waiting if g.kind == "router" or not self.work.reshard)

    def _reduce_size(self, group: Group) -> int:
        """Bytes of a gradient while it is reduced."""
        if self.work.mixed and group.kind != "router":
            return 4
        return group.trained_bytes // max(group.trained, 1)

    def _unreduced(self, group: Group | None) -> int:
        """A group's whole gradients as backward leaves them, or as they were added up."""
        if group is None or not group.managed:
            return 0
        summed = self.work.accumulates or group.kind == "router"
        return group.whole_trained * (self._reduce_size(group) if summed else self.work.batch.itemsize)

    def reduce_buffer(self, group: Group | None) -> int:
        """The input of a reduce-scatter, which stays until the next one."""
        if group is None or not group.managed:
            return 0
        return group.whole_trained * self._reduce_size(group)

    def _reduction(self, group: Group | None) -> int:
        """The worst of reducing a group's gradients: into the buffer, or out of it and into the parameters' dtype."""
        if group is None or not group.trained:
            return 0
        if not group.managed:
            return group.trained_bytes
        whole, out = self.reduce_buffer(group), group.trained * self._reduce_size(group)
        divided = whole if group.ranks == 1 and group.kind == "experts" else 0
        return whole + max(self._unreduced(group), out + max(divided, group.trained_bytes))

    def _accumulated(self, layers: int, *kinds: str) -> int:
        """Whole gradients of earlier micro-batches, of the groups that backward has not come to: the embedding, the
        first `layers` layers, and of the next one these kinds.
        """
        if not self.work.accumulates:
            return 0
        waiting = [g for g in self.shards.groups if g.layer < layers or (g.layer == layers and g.kind in kinds)]
        return sum(self.reduce_buffer(g) for g in waiting if g.kind != "head")

    def _reduced_after(self, layer: int) -> int:
        """Gradients of the groups that backward has finished before it comes to a layer."""
        return sum(g.trained_bytes for g in self.shards.groups if g.layer > layer or g.kind == "head")
