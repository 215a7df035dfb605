"""What the ranks do; imported by the processes that the launcher forks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dots_align.config import ParallelSection
from dots_align.model import experts
from dots_align.model.dots1 import create_model, preset_config
from dots_align.model.expert_parallel import clip_grad_norm, shard_model
from dots_align.model.router import moe_layers
from dots_align.model.sharded_io import load_weights, save_weights

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
    # Of the first seeds the one with which no two experts score so much alike, in any step of the tests here, that
    # rounding could decide between them: their scores are 3e-5 apart.
    model = create_model(config, 7)
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


def bytes_exchanged(ep: int, skew: bool) -> tuple[list[int], int]:
    """(bytes of rows of each all-to-all that this rank takes part in, bytes of its tokens' k rows in one layer)."""
    dist.init_process_group("gloo")
    model = tiny_model(skew)
    shard_model(model, ParallelSection(ep=ep), None, "cpu")
    real, sent = dist.all_to_all_single, []

    def counting(out: torch.Tensor, rows: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if rows.is_floating_point():
            sent.append(rows.nbytes)
        return real(out, rows, *arguments, **options)

    ids = sequences()[:1, : 3 + dist.get_rank()]  # every rank another number of tokens
    dist.all_to_all_single = counting
    try:
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    finally:
        dist.all_to_all_single = real
    dist.barrier()
    dist.destroy_process_group()
    return sent, ids.numel() * model.config.num_experts_per_tok * model.config.hidden_size * 4


def save_and_load(directory: str, ep: int, replicas: int) -> dict[str, Any]:
    """Saves a sharded model in small files, loads it into another sharding, and says what is equal and what it took."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    reference = tiny_model()
    model = copy.deepcopy(reference)
    shard_model(model, ParallelSection(ep=ep, dp_replicate=replicas), None, "cpu")
    save_weights(model, Path(directory), max_shard_bytes=20_000)
    other = tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    shard_model(other, ParallelSection(ep=world), None, "cpu")
    load_weights(other, Path(directory))
    expected = reference.state_dict()
    equal = {}
    for name, tensor in other.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        equal[name] = torch.equal(full, expected[name])
    dist.barrier()
    dist.destroy_process_group()
    return equal


def bf16_step(parallel: dict[str, Any]) -> dict[str, Any]:
    """One step that computes in bf16 with fp32 masters: dtypes seen, and how far it is from fp32."""
    dist.init_process_group("gloo")
    reference = tiny_model()
    model = copy.deepcopy(reference)
    shard_model(model, ParallelSection(**parallel), torch.bfloat16, "cpu")
    seen: dict[str, torch.dtype] = {}
    _, block = moe_layers(model)[0]
    block.experts.register_forward_pre_hook(lambda _m, a: seen.update(hidden=a[0].dtype, weights=a[2].dtype))
    block.gate.register_forward_hook(lambda _m, _a, out: seen.update(logits=out.dtype))
    step = Step()
    found = run_steps(model, step, dist.get_rank(), dist.get_world_size(), num_steps=1)
    seen["parameters"] = next(model.parameters()).dtype
    result = {"seen": {k: str(v) for k, v in seen.items()}, "loss": found["losses"][0]}
    result["expected"] = run_steps(reference, step, 0, 1, num_steps=1)["losses"][0]
    dist.barrier()
    dist.destroy_process_group()
    return result
