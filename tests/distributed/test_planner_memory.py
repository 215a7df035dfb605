"""The planner's memory against what real steps on real processes had alive at their worst."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from planner_cases import Case, Rollout, measure
from process_group import launch

from dots_align.config import ParallelSection
from dots_align.planner.activations import MicroBatch
from dots_align.planner.memory import MemoryModel, RolloutBatch, Work
from dots_align.planner.shards import Shards, shards_of

pytestmark = pytest.mark.slow
# Of the whole peak; parameters, gradients and optimizer states have to be exact. When gloo's threads let go of what
# they have sent moves a peak by half a per cent from run to run.
TOLERANCE = 0.12
EVERYTHING = {
    "r": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
CASES = {
    "alone": Case(1, tokens=512),
    "alone bf16": Case(1, bf16=True, checkpointing=True),
    "long": Case(2, {"ep": 2}, tokens=1024, sequences=2, checkpointing=True),
    "kept": Case(2, {"ep": 2}, tokens=512, bf16=True),
    "recomputed": Case(2, {"ep": 2}, tokens=512, bf16=True, checkpointing=True),
    "no ep": Case(2, {"ep": 1}, tokens=512, bf16=True, checkpointing=True),
    "never resharded": Case(2, {"ep": 2, "reshard_after_forward": False}, bf16=True),
    "large vocabulary": Case(2, {"ep": 2}, bf16=True, checkpointing=True, vocabulary=16384),
    "bf16 parameters": Case(4, {"ep": 4}, dtype="bfloat16", bf16=True, checkpointing=True),
    "offloaded": Case(2, {"ep": 2, "offload_optimizer": True}, dtype="bfloat16", bf16=True, checkpointing=True),
    "accumulated": Case(4, {"ep": 2}, bf16=True, checkpointing=True, accumulation=2),
    "replicas": Case(4, {"ep": 2, "dp_replicate": 2}, bf16=True),
    "adapters on attention": Case(2, {"ep": 2}, tokens=512, dtype="bfloat16", bf16=True, lora={"r": 8}),
    "adapters": Case(2, {"ep": 2}, tokens=512, dtype="bfloat16", bf16=True, checkpointing=True, lora=EVERYTHING),
    "adapters, accumulated": Case(4, {"ep": 4}, dtype="bfloat16", bf16=True, accumulation=2, lora=EVERYTHING),
}

ROLLOUTS = {
    "rollout": Rollout(2, {"ep": 2}),
    "rollout, no ep": Rollout(2, {"ep": 1}),
    "rollout, long prompts": Rollout(4, {"ep": 2}, prompt_tokens=96),
}


@functools.cache
def _measured(world: int) -> dict[str, Any]:
    """Of the first rank, which has the largest part of what does not divide evenly; one launch for all cases."""
    return launch(world, measure, {name: c for name, c in {**CASES, **ROLLOUTS}.items() if c.world == world})[0]


def _shards(case: Case) -> Shards:
    parallel = ParallelSection(**case.parallel)
    return shards_of(case.config, parallel, case.world, case.dtype, case.bf16, case.adapter)


def _batch(tokens: int, case: Case, scored: int | None = None) -> MicroBatch:
    """Random weights route evenly, and sequences of equal length need no padding."""
    rows = tokens * case.config.num_experts_per_tok
    size = 2 if case.bf16 else 4
    return MicroBatch(tokens, scored or tokens, tokens, rows, rows, size, case.parallel.get("ep", 1) > 1)


def _report(name: str, predicted: int, measured: int) -> float:
    error = predicted / measured - 1
    print(f"{name:28} predicted {predicted / 2**20:8.2f} MiB, measured {measured / 2**20:8.2f} MiB, {error:+.1%}")
    return error


@pytest.mark.parametrize("name", CASES)
def test_training_step(name):
    case = CASES[name]
    offload = bool(case.parallel.get("offload_optimizer"))
    reshard = case.parallel.get("reshard_after_forward", True)
    work = Work(
        _batch(case.tokens, case), case.checkpointing, case.accumulation > 1, offload, reshard, case.bf16, on_cpu=True
    )
    shards = _shards(case)
    memory = MemoryModel(case.config, shards, work)
    found = _measured(case.world)[name]
    assert found["parameters"] == shards.bytes
    assert found["gradients"] == shards.gradient_bytes
    assert found["optimizer"] == shards.optimizer_bytes(offload)
    # Offloaded states lie in the same memory here; of the host's bytes a quarter are gradients in the optimizer's step.
    host = {"optimizer": memory.host_bytes()}
    predicted = {
        phase: sum(moment.values()) + host.get(phase, memory.host_bytes() * 3 // 4)
        for phase, moment in memory.phases().items()
    }
    for phase, measured in found["peaks"].items():
        _report(f"{name}: {phase}", predicted[phase], measured)
    error = _report(f"{name}: peak", max(predicted.values()), max(found["peaks"].values()))
    assert abs(error) < TOLERANCE


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout(name):
    case = ROLLOUTS[name]
    training = Case(case.world, case.parallel, dtype="bfloat16", bf16=True)
    batch = RolloutBatch(case.groups, case.group_size, case.prompt_tokens, case.max_tokens)
    work = Work(
        _batch(256, training),
        checkpointing=False,
        accumulates=False,
        offload=True,
        reshard=True,
        mixed=True,
        rollout=batch,
        on_cpu=True,
    )
    moment = MemoryModel(training.config, _shards(training), work).phases()["rollout"]
    assert abs(_report(name, sum(moment.values()), _measured(case.world)[name])) < TOLERANCE
