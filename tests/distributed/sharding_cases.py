"""What the ranks do; imported by the processes that the launcher forks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dots_align.config import ParallelSection
from dots_align.model import experts
from dots_align.model.dots1 import create_model, preset_config
from dots_align.model.expert_parallel import clip_grad_norm, shard_model
from dots_align.model.router import moe_layers

NUM_SEQUENCES, LENGTH, VOCABULARY = 8, 24, 64


@dataclass(frozen=True)
class Step:
    """A training step to compare. `skew` sends every token to the first experts; `uneven` gives the first rank most of
    the tokens and the last one a single sequence.
    """

    accumulation: int = 1
    checkpointing: bool = False
    max_norm: float = 1e9
    skew: bool = False
    uneven: bool = False
    bf16: bool = False


def tiny_model(skew: bool = False) -> Any:
    config = preset_config(
        "tiny",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        n_routed_experts=16,
        num_experts_per_tok=3,
        initializer_range=0.1,
    )
    config._experts_implementation = experts.IMPLEMENTATION
    model = create_model(config, 0)
    generator = torch.Generator().manual_seed(1)
    for _, block in moe_layers(model):
        bias = block.gate.e_score_correction_bias
        bias.copy_(0.2 * torch.rand(bias.shape, generator=generator))
        if skew:
            bias[:3] += 10
    return model.train()


def sequences() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (NUM_SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(2))


def rows_of(rank: int, world: int, uneven: bool) -> list[int]:
    if not uneven:
        return list(range(NUM_SEQUENCES))[rank::world]
    bounds = [0, *(NUM_SEQUENCES - world + 1 + r for r in range(world))]
    return list(range(bounds[rank], bounds[rank + 1]))


def run_steps(model: Any, step: Step, rank: int, world: int, num_steps: int = 3) -> dict[str, Any]:
    """Optimizer steps on this rank's rows, each micro-batch's loss its share of the global mean."""
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mine = sequences(), rows_of(rank, world, step.uneven)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.5, foreach=False)
    losses, norms = [], []
    for _ in range(num_steps):
        parts = [mine[i :: step.accumulation] for i in range(step.accumulation)]
        total = 0.0
        for number, part in enumerate(parts):
            batch = ids[part] if part else ids[:1]
            sync = number + 1 == len(parts) or world == 1
            with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16 and world == 1):
                context = torch.enable_grad() if sync else model.no_sync()
                with context:
                    logits = model(input_ids=batch, use_cache=False).logits.float()
                    loss = torch.nn.functional.cross_entropy(
                        logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                    ) / (NUM_SEQUENCES * (LENGTH - 1))
                    loss = loss * (world if part else 0.0)
                    loss.backward()
            total += float(loss.detach()) / world
        clip = torch.nn.utils.clip_grad_norm_ if world == 1 else clip_grad_norm
        norms.append(float(clip(parameters, step.max_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    if world > 1:
        gathered = torch.tensor(losses)
        dist.all_reduce(gathered)
        losses = gathered.tolist()
    weights = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weights[name] = full.detach().clone()
    return {"losses": losses, "norms": norms, "weights": weights}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences."""

    def worst(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    weights = max(
        float((found["weights"][name] - value).norm() / value.norm()) for name, value in expected["weights"].items()
    )
    return {
        "loss": worst(found["losses"], expected["losses"]),
        "norm": worst(found["norms"], expected["norms"]),
        "weights": weights,
    }


def steps_equal_one_process(parallel: dict[str, Any], steps: list[Step]) -> list[dict[str, float]]:
    """Runs each step sharded, and on one process, and returns the differences (on rank 0)."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    differences = []
    for step in steps:
        reference = tiny_model(step.skew)
        model = copy.deepcopy(reference)
        shard_model(model, ParallelSection(**parallel), torch.bfloat16 if step.bf16 else None, "cpu")
        found = run_steps(model, step, rank, world)
        if rank == 0:
            differences.append(compare(found, run_steps(reference, step, 0, 1)))
    dist.barrier()
    dist.destroy_process_group()
    return differences
