"""What the ranks do in the router's tests; imported by the processes that the launcher forks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from sharding_cases import NUM_SEQUENCES, rows_of, sequences, tiny_model
from torch.distributed.tensor import DTensor

from dots_align.config import ParallelSection
from dots_align.model.balance import BalanceLoss, BiasPolicy
from dots_align.model.expert_parallel import shard_model
from dots_align.model.router import LoadMonitor, keep_router_in_fp32, moe_layers


def train(model: Any, checkpointing: bool, rank: int, world: int) -> dict[str, Any]:
    """Three steps of two micro-batches on this rank's rows, by the balance loss and the bias alone."""
    keep_router_in_fp32(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    reduce = dist.all_reduce if world > 1 else None
    monitor, balance = LoadMonitor(model, reduce), BalanceLoss(model, 1.0, reduce)
    policy = BiasPolicy(monitor, "update", 0.01)
    balance.scale = world / NUM_SEQUENCES
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=5.0, foreach=False)
    mine = rows_of(rank, world, uneven=False)
    for _ in range(3):
        for part in (mine[::2], mine[1::2]):
            (model(input_ids=sequences()[part], use_cache=False).logits.sum() * 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.after_step()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    biases = torch.stack([block.gate.e_score_correction_bias for _, block in moe_layers(model)])
    return {"weights": weights, "biases": biases, "load": monitor.take(), "balance": balance.take(), **policy.take()}


def balance_equals_one_process(parallel: dict[str, Any], checkpointing: bool) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    reference = tiny_model()
    model = copy.deepcopy(reference)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    shard_model(model, ParallelSection(**parallel), None, "cpu")
    found, expected = train(model, checkpointing, rank, world), train(reference, checkpointing, 0, 1)
    moved = sum(float((expected["weights"][n] - p).norm()) for n, p in before.items())
    differ = max(float((found["weights"][n] - p).norm() / p.norm()) for n, p in expected["weights"].items())
    dist.barrier()
    dist.destroy_process_group()
    return {
        "weights": differ,
        "moved": moved,
        "same_bias": torch.equal(found["biases"], expected["biases"]),
        "same_load": found["load"] == expected["load"],
        "balance": abs(found["balance"] - expected["balance"]),
        "pressure": abs(found["bias_pressure"] - expected["bias_pressure"]),
    }
