"""Whatever memory there is, in whatever order requests come, whoever is interrupted: the samples are the same."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_checks import assert_same
from transformers import Dots1ForCausalLM

from dots_align.model.router import keep_router_in_fp32
from dots_align.rollout.engine import Failed, RequestErrors, RolloutEngine
from dots_align.rollout.scheduler import Finished
from dots_align.types import GenerationRequest, Sample, SamplingParams

pytestmark = pytest.mark.usefixtures("forward")

STOP = tuple(range(60))
BEGINNING = np.random.default_rng(100).integers(0, 500, 30).tolist()


def sampling(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_token_ids=STOP, seed=seed)


def bytes_for(engine: RolloutEngine, blocks: int) -> int:
    return blocks * engine._bytes_per_block()


@st.composite
def workloads(draw: st.DrawFn) -> list[GenerationRequest]:
    requests = []
    for index in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 40))
        prompt = BEGINNING[: draw(st.integers(0, 30))]
        prompt += np.random.default_rng(draw(st.integers(0, 99))).integers(0, 500, length).tolist()
        requests.append(GenerationRequest(prompt, draw(st.integers(1, 4)), sampling(index, draw(st.integers(1, 24)))))
    return requests


@given(
    requests=workloads(),
    rows=st.integers(1, 9),
    chunk=st.integers(1, 30),
    block_size=st.integers(1, 9),
    extra_blocks=st.integers(0, 12),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_arrivals_lengths_and_budget_give_the_same_samples(
    model: Dots1ForCausalLM, requests, rows: int, chunk: int, block_size: int, extra_blocks: int, order
) -> None:
    wanted = RolloutEngine(model).generate(requests, return_routes=True)
    engine = RolloutEngine(model, rows, prefill_chunk_tokens=chunk, cache_block_size=block_size)
    least = max(engine.scheduler.blocks_needed(r) for r in requests)
    engine.kv_cache_bytes = bytes_for(engine, least + extra_blocks)
    arrivals = list(range(len(requests)))
    order.shuffle(arrivals)
    numbers: dict[int, int] = {}
    samples: dict[tuple[int, int], Sample] = {}
    while arrivals or engine.has_work:
        if arrivals and (order.random() < 0.4 or not engine.has_work):
            place = arrivals.pop()
            numbers[engine.submit(requests[place], return_routes=True)] = place
        for event in engine.step():
            assert isinstance(event, Finished)
            samples[numbers[event.request], event.index] = event.sample
    pool = engine.scheduler.pool
    assert pool is not None
    assert pool.num_free == pool.num_blocks <= least + extra_blocks  # no block is lost, and none too many was taken
    assert sorted(pool.take(pool.num_blocks).tolist()) == list(range(pool.num_blocks))
    found = [[samples[i, j] for j in range(r.num_samples)] for i, r in enumerate(requests)]
    assert_same(model, requests, found, wanted)


@given(
    requests=workloads(),
    block_size=st.integers(1, 8),
    extra_blocks=st.integers(0, 20),
    aborts=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    hand_over=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_aborted_anywhere_and_continued_elsewhere(
    model: Dots1ForCausalLM, requests, block_size: int, extra_blocks: int, aborts: list[int], hand_over: bool
) -> None:
    wanted = RolloutEngine(model).generate(requests, return_routes=True)

    def new_engine() -> RolloutEngine:
        engine = RolloutEngine(model, 6, prefill_chunk_tokens=17, cache_block_size=block_size)
        needed = max(engine.scheduler.blocks_needed(r) for r in requests)
        engine.kv_cache_bytes = bytes_for(engine, needed + extra_blocks)
        return engine

    engine = new_engine()
    begun: list[dict[int, Sample]] = [{} for _ in requests]
    for steps in [*aborts, 10_000]:
        asked = [
            dataclasses.replace(r, started=tuple(done[i] for i in sorted(done)))
            for r, done in zip(requests, begun, strict=True)
        ]
        numbers = [engine.submit(r, return_routes=True) for r in asked]
        for _ in range(steps):
            if not engine.has_work:
                break
            for event in engine.step():
                assert isinstance(event, Finished)
                begun[numbers.index(event.request)][event.index] = event.sample
        for place, number in enumerate(numbers):
            for event in engine.abort(number):
                begun[place][event.index] = event.sample
        assert not engine.has_work
        pool = engine.scheduler.pool
        assert pool is None or pool.num_free == pool.num_blocks
        if hand_over:
            engine = new_engine()
    found = [[done[i] for i in range(r.num_samples)] for r, done in zip(requests, begun, strict=True)]
    assert_same(model, requests, found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_forward_gives_the_same_bits_whatever_happens(
    model: Dots1ForCausalLM, token_ids, forward: str, dtype: torch.dtype
) -> None:
    """Alone or in company, read at once or in pieces, put back or not: ids, log-probs and routes are equal."""
    if forward != "native":
        pytest.skip("the order of torch's sums depends on shapes")
    keep_router_in_fp32(model)
    model.to(dtype)
    prompts = token_ids(20, 9, 33, 1)
    prompts.append([*prompts[2][:22], *prompts[1]])
    requests = [GenerationRequest(p, 5, SamplingParams(max_tokens=30, seed=i)) for i, p in enumerate(prompts)]
    wanted = RolloutEngine(model).generate(requests, return_routes=True)
    alone = [RolloutEngine(model, 1).generate([r], return_routes=True)[0] for r in requests]
    assert alone == wanted
    tight = RolloutEngine(model, 13, prefill_chunk_tokens=7, cache_block_size=4)
    tight.kv_cache_bytes = bytes_for(tight, 40)
    assert tight.generate(requests, return_routes=True) == wanted
    assert tight.stats.num_preempted > 0


def test_a_small_budget_is_kept_and_makes_late_comers_give_way(model: Dots1ForCausalLM, token_ids) -> None:
    requests = [
        GenerationRequest(p, 6, SamplingParams(max_tokens=40, seed=i)) for i, p in enumerate(token_ids(20, 9, 33))
    ]
    free = RolloutEngine(model, cache_block_size=4)
    wanted = free.generate(requests, return_routes=True)
    tight = RolloutEngine(model, cache_block_size=4, kv_cache_bytes=bytes_for(free, 60))
    assert_same(model, requests, tight.generate(requests, return_routes=True), wanted)
    assert tight.stats.num_preempted > 0 == free.stats.num_preempted
    assert tight.stats.peak_cache_bytes <= bytes_for(free, 60) < free.stats.peak_cache_bytes
    assert tight.stats.num_sampled_tokens == free.stats.num_sampled_tokens == 18 * 40


def test_a_group_shares_its_prompts_memory(model: Dots1ForCausalLM, token_ids) -> None:
    """16 samples of a 128-token prompt: the prompt is there once."""
    engine = RolloutEngine(model, cache_block_size=16)
    engine.generate([GenerationRequest(token_ids(128)[0], 16, SamplingParams(max_tokens=17))])
    assert engine.stats.peak_cache_bytes == bytes_for(engine, 128 // 16 + 16)


def test_prompts_that_begin_alike_share_what_is_alike(model: Dots1ForCausalLM, token_ids) -> None:
    """The examples that precede each question of an evaluation are read once, and are there once."""
    examples, *questions = token_ids(100, 5, 12, 20, 1)
    requests = [GenerationRequest(examples + q, 2, sampling(i, 10)) for i, q in enumerate(questions)]
    wanted = [RolloutEngine(model).generate([r], return_routes=True)[0] for r in requests]
    engine = RolloutEngine(model, cache_block_size=16)
    assert_same(model, requests, engine.generate(requests, return_routes=True), wanted)
    shared = 100 // 16 * 16
    assert engine.stats.num_reused_tokens == 3 * shared
    assert engine.stats.num_prompt_tokens == 100 + 3 * (100 - shared) + 5 + 12 + 20 + 1
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.step()
    pool = engine.scheduler.pool
    assert pool is not None
    # What is alike, the ends, and what the samples of the first prompt have said.
    assert pool.num_blocks - pool.num_free == shared // 16 + (1 + 1 + 2 + 1) + 2
    engine.scheduler.put_all_back()
    assert pool.num_free == pool.num_blocks


def test_what_is_shared_outlives_the_prompt_that_read_it(model: Dots1ForCausalLM, token_ids) -> None:
    """One row: each prompt leaves before the next is let in, unless it still waits; nothing is taken for something
    else that lies in the same block later.
    """
    beginning, *ends = token_ids(40, 9, 9, 9, 9)
    requests = [GenerationRequest(beginning + e, 3, sampling(i, 20)) for i, e in enumerate(ends)]
    others = [GenerationRequest(p, 1, sampling(9, 20)) for p in token_ids(33, 47)]
    asked = [requests[0], others[0], requests[1], requests[2], others[1], requests[3]]
    wanted = [RolloutEngine(model).generate([r], return_routes=True)[0] for r in asked]
    for rows in (1, 2, 5):
        engine = RolloutEngine(model, rows, cache_block_size=8)
        assert_same(model, asked, engine.generate(asked, return_routes=True), wanted)


def test_new_weights_read_every_prompt_again(model: Dots1ForCausalLM, token_ids) -> None:
    (prompt,) = token_ids(50)
    engine = RolloutEngine(model, cache_block_size=8)
    first = GenerationRequest(prompt, 1, sampling(0, 30))
    engine.submit(first)
    engine.step()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    engine.weights_changed()
    engine.submit(GenerationRequest(prompt, 1, sampling(1, 30)))
    while engine.has_work:
        engine.step()
    assert engine.stats.num_prompt_tokens >= 100
    fresh = RolloutEngine(model).generate([GenerationRequest(prompt, 1, sampling(1, 30))])
    assert (
        engine.generate([GenerationRequest(prompt, 1, sampling(1, 30))])[0][0].response_ids == fresh[0][0].response_ids
    )


def test_what_cannot_fit_alone_is_refused(model: Dots1ForCausalLM, token_ids) -> None:
    engine = RolloutEngine(model, cache_block_size=4)
    engine.kv_cache_bytes = bytes_for(engine, 9)
    long, short = (GenerationRequest(p, 2, SamplingParams(max_tokens=8)) for p in token_ids(30, 28))
    with pytest.raises(RequestErrors, match=r"request 0: prompt and answer need .* bytes of keys and values") as caught:
        engine.generate([long, short])
    assert [len(s.response_ids) for s in caught.value.samples[1]] == [8, 8]
    with pytest.raises(ValueError, match="raise it, shorten the prompt or lower max_tokens"):
        engine.submit(long)


def test_samples_come_as_they_end(model: Dots1ForCausalLM, token_ids) -> None:
    limits = (30, 3, 12)
    requests = [
        GenerationRequest(p, 2, SamplingParams(max_tokens=n)) for p, n in zip(token_ids(5, 6, 7), limits, strict=True)
    ]
    engine = RolloutEngine(model)
    seen = []
    for event in engine.stream(requests):
        assert isinstance(event, Finished)
        seen.append((event.request, event.index))
        if event.request == 1:
            assert engine.has_work  # the long ones are still at it
    assert seen == [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]


def test_a_stream_that_is_left_leaves_nothing_behind(model: Dots1ForCausalLM, token_ids) -> None:
    engine = RolloutEngine(model)
    before = model.config._attn_implementation
    stream = engine.stream([GenerationRequest(p, 3, SamplingParams(max_tokens=20)) for p in token_ids(5, 6)])
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert not engine.has_work
    assert engine.scheduler.pool is None
    assert model.config._attn_implementation == before


def test_sleep_frees_the_cache_and_nothing_is_lost(model: Dots1ForCausalLM, token_ids) -> None:
    requests = [GenerationRequest(p, 3, sampling(i, 30)) for i, p in enumerate(token_ids(5, 26, 7))]
    wanted = RolloutEngine(model).generate(requests, return_routes=True)
    engine = RolloutEngine(model, 5)
    numbers = [engine.submit(r, return_routes=True) for r in requests]
    samples: dict[tuple[int, int], Sample] = {}
    for turn in range(10_000):
        if not engine.has_work:
            break
        if turn % 7 == 3:
            engine.sleep()
            assert engine.scheduler.pool is None
        if turn % 14 == 3:
            engine.wake()
            assert engine.scheduler.pool is not None
        for event in engine.step():
            assert isinstance(event, Finished)
            samples[numbers.index(event.request), event.index] = event.sample
    found = [[samples[i, j] for j in range(3)] for i in range(3)]
    assert_same(model, requests, found, wanted)
    assert [s.routes for group in found for s in group] == [s.routes for group in wanted for s in group]


def test_new_weights_are_used_for_all_that_follows(model: Dots1ForCausalLM, token_ids) -> None:
    (prompt,) = token_ids(9)
    request = GenerationRequest(prompt, 1, SamplingParams(temperature=0.0, max_tokens=12))
    engine = RolloutEngine(model)
    engine.submit(request)
    for _ in range(5):
        engine.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    engine.weights_changed()
    events = []
    while engine.has_work:
        events += engine.step()
    ids = events[0].sample.response_ids
    # The first 5 tokens are the old weights', and what follows is what the new ones say to a prompt with these.
    wanted = RolloutEngine(model).generate(
        [GenerationRequest(prompt + ids[:5], 1, SamplingParams(temperature=0.0, max_tokens=7))]
    )
    assert ids[5:] == wanted[0][0].response_ids


def test_nan_fails_one_request_by_name_and_spares_the_others(model: Dots1ForCausalLM, token_ids) -> None:
    prompts = token_ids(12, 9, 14)
    make = partial(GenerationRequest, num_samples=2, sampling=SamplingParams(max_tokens=20, seed=3))
    fine = RolloutEngine(model).generate([make(prompts[0]), make(prompts[2])], return_routes=True)
    bad = 505
    assert not any(bad in p for p in prompts)
    assert not any(bad in s.response_ids for group in fine for s in group)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    engine = RolloutEngine(model, cache_block_size=2)
    asked = [make(prompts[0]), make([*prompts[1], bad]), make(prompts[2])]
    told = r"request 1: the logits after 10 tokens are NaN or infinite, first in the embedding; look at the weights"
    with pytest.raises(RequestErrors, match=told) as caught:
        engine.generate(asked, return_routes=True)
    found = [caught.value.samples[0], caught.value.samples[2]]
    assert_same(model, [asked[0], asked[2]], found, fine)
    # Nor does what it left in the cache harm whoever takes its blocks.
    number = engine.submit(asked[1])
    events = [event for _ in range(3) for event in engine.step()]
    assert [e.request for e in events if isinstance(e, Failed)] == [number]
    assert all(bool(torch.isfinite(layer).all()) for layer in engine.scheduler.pool.keys)  # pyright: ignore[reportOptionalMemberAccess]
    again = engine.generate([asked[0], asked[2]], return_routes=True)
    assert_same(model, [asked[0], asked[2]], again, fine)


@pytest.mark.parametrize(
    ("name", "told"),
    [("model.layers.1.self_attn.o_proj", "layer 1"), ("model.norm", "the final norm"), ("lm_head", "the head")],
)
def test_the_layer_where_nan_began_is_named(model: Dots1ForCausalLM, token_ids, name: str, told: str) -> None:
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[3] = float("nan")  # pyright: ignore[reportCallIssue]
    with pytest.raises(RequestErrors, match=f"after 4 tokens are NaN or infinite, first in {told}; look"):
        RolloutEngine(model).generate([GenerationRequest(token_ids(4)[0])])
