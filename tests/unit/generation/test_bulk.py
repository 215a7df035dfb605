"""Feeding an engine: few samples in line, all of them done, the same ones as all at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import Dots1ForCausalLM

from dots_align.generation.bulk import BulkSampler
from dots_align.rollout.engine import RolloutEngine
from dots_align.types import GenerationRequest, SamplingParams


def test_many_prompts_pass_through_a_short_line(model: Dots1ForCausalLM, token_ids) -> None:
    prompts = token_ids(*[3 + n % 9 for n in range(30)])
    requests = [GenerationRequest(p, 3, SamplingParams(max_tokens=1 + i % 7, seed=i)) for i, p in enumerate(prompts)]
    taken = 0

    def source() -> Iterator[tuple[int, GenerationRequest]]:
        nonlocal taken
        for place, request in enumerate(requests):
            taken += 1
            yield 100 + place, request

    engine = RolloutEngine(model, max_num_sequences=6)
    sampler, found = BulkSampler(engine), {}
    for place, samples in sampler.run(source()):
        found[place - 100] = samples
        assert sampler.in_line <= 12 + 2  # a group is not torn apart
        assert taken - len(found) <= 4 + 3 + 1  # in line, beside those that the loop has yet to see, and the next
    assert sampler.in_line == 0
    assert engine.scheduler.pool is None
    wanted = RolloutEngine(model).generate(requests)
    assert [[s.response_ids for s in found[i]] for i in range(30)] == [[s.response_ids for s in g] for g in wanted]


def test_what_cannot_be_done_is_told_in_its_place(model: Dots1ForCausalLM, token_ids) -> None:
    good, long = token_ids(5, 300)
    asked = [
        (0, GenerationRequest(long)),
        (1, "no template"),
        (2, GenerationRequest(good, 2, SamplingParams(max_tokens=3))),
        (3, GenerationRequest([])),
    ]
    found = dict(BulkSampler(RolloutEngine(model)).run(asked))
    assert "exceeds the context of 256 tokens" in str(found[0])
    assert found[1] == "no template"
    assert len(found[2]) == 2
    assert "the prompt is empty" in str(found[3])


def test_broken_weights_fail_prompts_one_by_one(model: Dots1ForCausalLM, token_ids) -> None:
    model.model.embed_tokens.weight.data[505] = float("nan")
    prompts = [p if i % 2 else [*p, 505] for i, p in enumerate(token_ids(*[4] * 8))]
    requests = [(i, GenerationRequest(p, 4, SamplingParams(max_tokens=2))) for i, p in enumerate(prompts)]
    sampler = BulkSampler(RolloutEngine(model, max_num_sequences=4))
    found = dict(sampler.run(requests))
    assert sorted(found) == list(range(8))
    for i in range(0, 8, 2):
        assert "NaN" in str(found[i])
    assert sum(isinstance(value, list) for value in found.values()) >= 1
    assert sampler.in_line == 0


def test_an_error_of_the_reader_leaves_the_model_as_it_was(model: Dots1ForCausalLM, token_ids) -> None:
    before = model.config._attn_implementation
    requests = [(i, GenerationRequest(p, 2)) for i, p in enumerate(token_ids(4, 5))]
    run = BulkSampler(RolloutEngine(model)).run(requests)
    next(run)
    with pytest.raises(OSError, match="disk full"):
        run.throw(OSError("disk full"))
    assert model.config._attn_implementation == before
