"""What the ranks do in the rollout's tests; imported by the processes that the launcher forks."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from sample_checks import against_one_forward, assert_same
from sharding_cases import VOCABULARY, tiny_model

from dots_align.config import ParallelSection
from dots_align.model.expert_parallel import shard_model
from dots_align.rollout.engine import RolloutEngine
from dots_align.rollout.scheduler import Finished
from dots_align.types import GenerationRequest, Sample, SamplingParams


@dataclass(frozen=True)
class Case:
    """A way to spread the model and to roll out. `blocks`: the cache's size beyond the least that works, None for all
    that is needed. `skew`: every token goes to the first experts.
    """

    parallel: dict[str, Any]
    blocks: int | None = None
    num_rows: int = 64
    chunk_tokens: int = 8192
    skew: bool = False


def all_requests() -> list[GenerationRequest]:
    """Of very different lengths; one token in 32 ends a turn."""
    choice = random.Random(0)
    return [
        GenerationRequest(
            [choice.randrange(VOCABULARY) for _ in range(choice.choice((1, 3, 20, 45)))],
            choice.choice((1, 2, 5)),
            SamplingParams(max_tokens=choice.choice((1, 9, 30)), stop_token_ids=(0, 1), seed=index),
        )
        for index in range(9)
    ]


def engine_for(model: Any, case: Case, requests: list[GenerationRequest]) -> RolloutEngine:
    engine = RolloutEngine(model, case.num_rows, prefill_chunk_tokens=case.chunk_tokens, cache_block_size=4)
    if case.blocks is not None:
        least = max(engine.scheduler.blocks_needed(r) for r in requests)
        engine.kv_cache_bytes = (least + case.blocks) * engine._bytes_per_block()
    return engine


def share_of(rank: int, world: int, requests: list[GenerationRequest]) -> list[int]:
    """Unequal shares: the last rank has nothing to do."""
    return [i for i in range(len(requests)) if i % max(world - 1, 1) == rank]


def interrupted(engine: RolloutEngine, requests: list[GenerationRequest]) -> list[list[Sample]]:
    """The samples of requests that are aborted after six steps of all ranks, and then continued."""
    numbers = [engine.submit(r, return_routes=True) for r in requests]
    begun: list[dict[int, Sample]] = [{} for _ in requests]
    for _ in range(6):
        for event in engine.step():
            assert isinstance(event, Finished)
            begun[numbers.index(event.request)][event.index] = event.sample
    for number, samples in zip(numbers, begun, strict=True):
        samples.update({event.index: event.sample for event in engine.abort(number)})
    again = [
        replace(r, started=tuple(done[i] for i in range(r.num_samples)))
        for r, done in zip(requests, begun, strict=True)
    ]
    return engine.generate(again, return_routes=True)


def rolls_out_as_one_process(cases: list[Case]) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    rank, world, requests = dist.get_rank(), dist.get_world_size(), all_requests()
    found = []
    for case in cases:
        alone = tiny_model(case.skew).eval()
        wanted = RolloutEngine(alone).generate(requests, return_routes=True)
        model = copy.deepcopy(alone)
        shard_model(model, ParallelSection(**case.parallel), None, "cpu")
        mine = share_of(rank, world, requests)
        own = [requests[i] for i in mine]
        engine = engine_for(model, case, requests)
        samples = engine.generate(own, return_routes=True)
        continued = interrupted(engine, own)
        for some in (samples, continued):
            assert_same(alone, own, some, [wanted[i] for i in mine])
        largest, compared, flipped = against_one_forward(alone, own, samples)
        found.append(
            {
                "samples": sum(len(group) for group in samples),
                "largest": largest,
                "compared": compared,
                "flipped": flipped,
                "preempted": engine.stats.num_preempted,
            }
        )
    dist.barrier()
    dist.destroy_process_group()
    return found
