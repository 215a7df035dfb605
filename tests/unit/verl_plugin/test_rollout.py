"""The server that puts verl's single samples together, in front of the real engine; Ray's calls are made here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from transformers import Dots1ForCausalLM

from dots_align.rollout.engine import RolloutEngine
from dots_align.types import GenerationRequest, Sample, SamplingParams

rollout: Any = pytest.importorskip("dots_align.verl_plugin.rollout")

PROMPTS = ([5, 17, 40], [9, 8, 7, 200, 31])
MAX_TOKENS, NUM_SAMPLES = 40, 3


class Here:
    """A worker's handle whose calls are answered in this process, after the loop had time for something else."""

    num_calls = 0

    class _Call:
        async def remote(self, function: Any, *arguments: Any) -> Any:
            await asyncio.sleep(0.01)
            Here.num_calls += 1
            return function(None, *arguments)

    __ray_call__ = _Call()


@pytest.fixture
def server(loaded_model: Dots1ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rollout, "_here", [rollout.Desk(RolloutEngine(loaded_model))])
    monkeypatch.setattr(rollout, "STEPS_AT_A_TIME", 5)
    return lambda: rollout.RolloutServer([Here()], MAX_TOKENS, 0.0)


def asked(prompt: list[int], number: int, sample: int, begun: list[int]) -> dict[str, Any]:
    sampling = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "seed": 100 + number,
        "sample": sample,
        "num_samples": NUM_SAMPLES,
        "prompt_length": len(prompt),
        "stop_token_ids": list(range(8)),
    }
    return {"prompt_ids": prompt + begun, "sampling_params": sampling, "request_id": "0" * 32}


def expected(model: Dots1ForCausalLM) -> list[list[Sample]]:
    """What the engine samples when it is asked for groups."""
    params = [SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=tuple(range(8)), seed=100 + n) for n in range(2)]
    requests = [GenerationRequest(p, NUM_SAMPLES, s) for p, s in zip(PROMPTS, params, strict=True)]
    return RolloutEngine(model).generate(requests)


async def one(server: Any, number: int, sample: int) -> tuple[list[int], list[float], int]:
    """A sample as verl's client asks for it: again and again, until it has ended; and how often."""
    ids: list[int] = []
    logprobs: list[float] = []
    for attempt in range(1, 50):
        found = await server.generate(**asked(list(PROMPTS[number]), number, sample, ids))
        ids, logprobs = ids + found.token_ids, logprobs + found.log_probs
        if found.stop_reason != "aborted":
            return ids, logprobs, attempt
        await asyncio.sleep(0.02)
    raise AssertionError("never ended")


def test_samples_tell_the_step_of_their_weights(server: Any) -> None:
    async def first() -> Any:
        running = server()
        rollout._here[-1].global_steps = 7
        return await asyncio.gather(*(running.generate(**asked(PROMPTS[0], 0, i, [])) for i in range(NUM_SAMPLES)))

    assert [found.extra_fields["global_steps"] for found in asyncio.run(first())] == [7] * NUM_SAMPLES


async def everything(server: Any, aborts: int) -> list[tuple[list[int], list[float], int]]:
    tasks = [asyncio.create_task(one(server, n, i)) for n in range(2) for i in range(NUM_SAMPLES)]
    for _ in range(aborts):
        enough = Here.num_calls + 3  # of eight, in which they would come to their end
        while Here.num_calls < enough and not all(task.done() for task in tasks):
            await asyncio.sleep(0.001)
        await server.abort_all_requests()
        await server.resume_generation()
    return await asyncio.gather(*tasks)


@pytest.mark.parametrize("aborts", [0, 2])
def test_samples_are_those_of_the_engine_also_across_aborts(
    loaded_model: Dots1ForCausalLM, server: Any, aborts: int
) -> None:
    found = asyncio.run(everything(server(), aborts))
    wanted = [sample for group in expected(loaded_model) for sample in group]
    assert [ids for ids, _, _ in found] == [sample.response_ids for sample in wanted]
    for (_, logprobs, _), sample in zip(found, wanted, strict=True):
        assert logprobs == pytest.approx(sample.rollout_logprobs, abs=1e-4)
    assert max(attempts for _, _, attempts in found) > 1 if aborts else all(a == 1 for _, _, a in found)


def test_one_who_gives_up_costs_the_others_nothing(server: Any) -> None:
    async def one_of_them() -> list[Any]:
        running = server()
        tasks = [asyncio.create_task(running.generate(**asked(PROMPTS[0], 0, i, []))) for i in range(NUM_SAMPLES)]
        await asyncio.sleep(rollout.QUIET_SECONDS / 5)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(one_of_them())
    assert isinstance(second, asyncio.CancelledError)
    assert first.token_ids
    assert third.token_ids


def test_what_cannot_be_done_is_told_to_all_who_asked(server: Any) -> None:
    async def both() -> list[Any]:
        running = server()
        requests = [asked([5, 10**9], 0, sample, []) for sample in range(NUM_SAMPLES)]
        return await asyncio.gather(*(running.generate(**r) for r in requests), return_exceptions=True)

    found = asyncio.run(both())
    assert len(found) == NUM_SAMPLES
    assert all(isinstance(error, ValueError) and "vocabulary" in str(error) for error in found)
