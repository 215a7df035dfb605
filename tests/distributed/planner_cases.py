"""What the ranks do for the planner's tests: real sharded steps and rollouts, and what was alive at their worst."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import UntypedStorage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Dots1Config, Dots1ForCausalLM

from dots_align.config import LoraSection, OptimSection, ParallelSection
from dots_align.model import attention, experts
from dots_align.model.dots1 import materialize, preset_config
from dots_align.model.expert_parallel import clip_grad_norm, no_gradient_sync, shard_model
from dots_align.model.logprobs import model_logprobs
from dots_align.model.lora import add_adapter
from dots_align.model.optimizer import make_optimizer
from dots_align.model.packed import pack
from dots_align.model.router import keep_router_in_fp32
from dots_align.rollout.engine import RolloutEngine
from dots_align.types import GenerationRequest, SamplingParams

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Case:
    """A training step. `tokens` of one forward, in `sequences` of equal length."""

    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    tokens: int = 256
    sequences: int = 1
    dtype: str = "float32"
    bf16: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    lora: dict[str, Any] | None = None
    vocabulary: int = 512

    @property
    def config(self) -> Dots1Config:
        config = preset_config("tiny", vocab_size=self.vocabulary, **SHAPE)
        config._experts_implementation = experts.IMPLEMENTATION
        config._attn_implementation = attention.IMPLEMENTATION
        return config

    @property
    def adapter(self) -> LoraSection | None:
        return None if self.lora is None else LoraSection(**self.lora)


@dataclass(frozen=True)
class Rollout:
    """A rollout of a sharded model in bf16: every rank its own groups."""

    world: int
    parallel: dict[str, Any]
    groups: int = 2
    group_size: int = 4
    prompt_tokens: int = 24
    max_tokens: int = 40

    @property
    def config(self) -> Dots1Config:
        return Case(self.world).config


class LiveStorages(TorchDispatchMode):
    """Sums the storages that are alive, after every operation, and keeps the most.

    Operations show which storages there are; weak references tell when one is gone, whoever dropped it (also gloo's
    threads). What a kernel allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, list[int]] = {}  # address -> [weak reference, bytes]
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((out, args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        if self.total > self.peak:  # an upper bound: nothing has been taken off since the last count
            self.count()
            self.peak = max(self.peak, self.total)
        return out

    def see(self, tensor: torch.Tensor) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self.storages.get(key)
        if known is not None and UntypedStorage._expired(known[0]):
            self.total -= known[1]
            known = None
        if known is None:
            known = self.storages[key] = [storage._weak_ref(), 0]
        self.total += size - known[1]
        known[1] = size  # FSDP2 resizes storages

    def count(self) -> None:
        for key, known in list(self.storages.items()):
            storage = UntypedStorage._new_with_weak_ptr(known[0])
            if storage is None:
                del self.storages[key]
            else:
                known[1] = storage.nbytes()
        self.total = sum(size for _, size in self.storages.values())

    @contextmanager
    def phase(self, name: str, peaks: dict[str, int]) -> Iterator[None]:
        self.count()
        self.peak = self.total
        yield
        self.count()
        peaks[name] = self.peak


def _model(
    config: Dots1Config, parallel: dict[str, Any], dtype: str, bf16: bool, lora: LoraSection | None, sharded: bool
) -> Any:
    """The model as a stage makes it, with weights of no meaning."""
    with torch.device("meta"):
        model: Any = Dots1ForCausalLM(config)
    keep_router_in_fp32(model)
    model.to(getattr(torch, dtype))
    if lora is not None:
        model = add_adapter(model, lora, "")
    if sharded:
        shard_model(model, ParallelSection(**parallel), torch.bfloat16 if bf16 else None, "cpu")
    materialize(model, torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = experts.local(parameter)
            part.fill_(1.0) if "norm" in name else part.normal_(0, 0.02)
        for buffer in model.buffers():
            if buffer.shape == (config.n_routed_experts,):
                buffer.zero_()
    return model.train()


def _step(case: Case, model: Any, optimizer: Any, live: LiveStorages) -> tuple[dict[str, int], int]:
    """Peaks of the phases of one optimizer step, and the bytes of its gradients."""
    peaks: dict[str, int] = {}
    generator = torch.Generator().manual_seed(dist.get_rank())
    for number in range(case.accumulation):
        size = (case.sequences, case.tokens // case.sequences)
        batch = pack(torch.randint(case.vocabulary, size, generator=generator).tolist(), torch.device("cpu"))
        targets = batch.input_ids.roll(-1, 1)
        last = number + 1 == case.accumulation
        with nullcontext() if last else no_gradient_sync(model):
            with live.phase("forward", peaks):
                scores = model_logprobs(model, batch.model_inputs(), targets, with_entropy=True, with_metrics=True)
            with live.phase("backward", peaks):
                (-scores.logprobs.mean()).backward()
            del scores
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(experts.local(p.grad).nbytes for p in trained)
    with live.phase("optimizer", peaks):
        clip_grad_norm(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return peaks, gradients


def _watching(live: LiveStorages) -> Any:
    """Only the first rank is asked what it saw, and looking after every operation is most of the time."""
    return live if dist.get_rank() == 0 else nullcontext()


def _training(case: Case) -> dict[str, Any]:
    """Measured bytes of the second step: when the optimizer has its states."""
    sharded = case.world > 1 or case.bf16
    model = _model(case.config, case.parallel, case.dtype, case.bf16, case.adapter, sharded)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    offload = bool(case.parallel.get("offload_optimizer"))
    optimizer = make_optimizer(model.named_parameters(), OptimSection(), offload)
    live = LiveStorages()
    with _watching(live):
        for parameter in model.parameters():
            live.see(parameter.detach())
        _step(case, model, optimizer, live)
        peaks, gradients = _step(case, model, optimizer, live)
    states = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    return {
        "parameters": sum(experts.local(p).nbytes for p in model.parameters()),
        "gradients": gradients,
        "optimizer": sum(t.nbytes for t in states),
        "peaks": peaks,
    }


def _rollout(case: Rollout) -> int:
    """Measured bytes at the worst moment of a rollout."""
    model = _model(case.config, case.parallel, "bfloat16", True, None, sharded=True)
    sampling = SamplingParams(max_tokens=case.max_tokens)
    prompts = [[1 + group + i for i in range(case.prompt_tokens)] for group in range(case.groups)]  # nothing alike
    requests = [GenerationRequest(prompt, case.group_size, sampling) for prompt in prompts]
    live, peaks = LiveStorages(), {}
    with _watching(live), live.phase("rollout", peaks):
        for parameter in model.parameters():
            live.see(parameter.detach())
        RolloutEngine(model, case.groups * case.group_size).generate(requests, return_routes=True)
    return peaks["rollout"]


def measure(cases: dict[str, Case | Rollout]) -> dict[str, Any]:
    """What each case had alive on this rank."""
    dist.init_process_group("gloo")
    found = {}
    for name, case in cases.items():
        found[name] = _training(case) if isinstance(case, Case) else _rollout(case)
        gc.collect()  # sharded modules refer to each other
        dist.barrier()
    dist.destroy_process_group()
    return found
