"""The rollout engine says what the model says, whatever is batched with what."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from sample_checks import assert_same
from transformers import Dots1ForCausalLM

from dots_align.model.packed import pack
from dots_align.model.router import find_flips, record_routes
from dots_align.rollout.engine import RequestErrors, RolloutEngine
from dots_align.types import GenerationRequest, Sample, SamplingParams

pytestmark = pytest.mark.usefixtures("forward")

LENGTHS = (3, 40, 1, 17, 8, 25, 2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture
def prompts(token_ids) -> list[list[int]]:
    return token_ids(*LENGTHS)


def requests(prompts: list[list[int]], num_samples: int = 3, max_tokens: int = 12, **keys) -> list[GenerationRequest]:
    """Each with a seed of its own, as the RL loop gives them; one token in eight ends a turn."""
    stop = tuple(range(60))
    sampling = [SamplingParams(max_tokens=max_tokens, stop_token_ids=stop, seed=i, **keys) for i in range(len(prompts))]
    return [GenerationRequest(p, num_samples, s) for p, s in zip(prompts, sampling, strict=True)]


def ids(samples: list[list[Sample]]) -> list[list[list[int]]]:
    return [[s.response_ids for s in group] for group in samples]


@contextmanager
def fed_tokens(model: Dots1ForCausalLM) -> Iterator[list[int]]:
    """How many tokens each forward fed to the model."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    yield counts
    hook.remove()


def teacher_forced(model: Dots1ForCausalLM, prompt: list[int], sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response in one forward, and which of them lie behind a routing flip."""
    with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
        logits = model(**pack([prompt + sample.response_ids], torch.device("cpu")).model_inputs()).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    flips = find_flips(recorded.routes[0], recorded.gaps[0], sample.routes or b"")
    picked = logprobs.gather(-1, torch.tensor(sample.response_ids)[:, None]).squeeze(-1)
    return picked, flips.affected[len(prompt) - 1 :]


def test_greedy_is_transformers_generate(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    found = RolloutEngine(model).generate([GenerationRequest(p, 1, GREEDY) for p in prompts])
    for prompt, (sample,) in zip(prompts, found, strict=True):
        answer = model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert sample.response_ids == answer[0, len(prompt) :].tolist()
        assert sample.finish_reason == "length"
        assert sample.rollout_logprobs == [0.0] * 16


def test_logprobs_equal_a_teacher_forced_pass(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    """Prompts share forwards, groups share prompts; what was sampled with which probability is the model's own word."""
    samples = RolloutEngine(model, 8).generate(requests(prompts, 3, 20), return_routes=True)
    compared = 0
    for prompt, group in zip(prompts, samples, strict=True):
        for sample in group:
            wanted, affected = teacher_forced(model, prompt, sample)
            found = torch.tensor(sample.logprobs)
            assert sample.rollout_logprobs == pytest.approx(sample.logprobs, abs=1e-6)  # temperature 1, no filter
            assert float((found - wanted)[~affected].abs().max()) < 1e-4
            compared += int((~affected).sum())
    assert compared > 100


def test_rollout_logprobs_are_those_of_the_tempered_distribution(
    model: Dots1ForCausalLM, prompts: list[list[int]]
) -> None:
    (group,) = RolloutEngine(model).generate(
        [GenerationRequest(prompts[3], 4, SamplingParams(temperature=0.5, max_tokens=8, seed=1))], return_routes=True
    )
    for sample in group:
        with torch.no_grad():
            logits = model(torch.tensor([prompts[3] + sample.response_ids]), use_cache=False).logits[0]
        tempered = (logits[len(prompts[3]) - 1 : -1] / 0.5).log_softmax(-1)
        wanted = tempered.gather(-1, torch.tensor(sample.response_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(sample.rollout_logprobs), wanted, atol=2e-4, rtol=0)
        assert sample.rollout_logprobs != pytest.approx(sample.logprobs, abs=1e-3)


@pytest.mark.parametrize("max_num_sequences", [1, 2, 3, 7, 10, 100])
def test_what_is_sampled_does_not_depend_on_how_many_run_at_once(
    model: Dots1ForCausalLM, prompts: list[list[int]], max_num_sequences: int
) -> None:
    """Groups of 3 are torn apart by a limit of 1 or 2, and share the cache's slots one after the other."""
    asked = requests(prompts)
    wanted = RolloutEngine(model, 256).generate(asked, return_routes=True)
    assert len({len(s.response_ids) for group in wanted for s in group}) > 3
    assert_same(model, asked, RolloutEngine(model, max_num_sequences).generate(asked, return_routes=True), wanted)


def test_what_is_sampled_does_not_depend_on_order_or_company(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    asked = requests(prompts)
    engine = RolloutEngine(model, 9)
    wanted = engine.generate(asked, return_routes=True)
    order = list(range(len(asked)))
    random.Random(0).shuffle(order)
    shuffled = engine.generate([asked[i] for i in order], return_routes=True)
    assert_same(model, asked, [shuffled[order.index(i)] for i in range(len(asked))], wanted)
    alone = [engine.generate([request], return_routes=True)[0] for request in asked]
    assert_same(model, asked, alone, wanted)


def test_samples_of_a_prompt_differ_and_seeds_repeat_them(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    def sample(seed: int, num_samples: int = 6) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=10, seed=seed)
        return ids(RolloutEngine(model).generate([GenerationRequest(prompts[0], num_samples, sampling)]))[0]

    assert len({tuple(r) for r in sample(0)}) == 6
    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert sample(0, 3) == sample(0)[:3]


def test_sampling_leaves_the_global_rng_alone(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    before = torch.get_rng_state()
    RolloutEngine(model).generate(requests(prompts[:2]))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_is_read_once_for_all_its_samples(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    asked = requests(prompts, num_samples=4)
    with fed_tokens(model) as counts:
        samples = RolloutEngine(model, 256, native=False).generate(asked)
    answered = [s for group in samples for s in group]
    # Every prompt token once; every response token but the last of each sample, which nobody reads.
    assert sum(counts) == sum(LENGTHS) + sum(len(s.response_ids) - 1 for s in answered)
    assert counts[0] == sum(LENGTHS)


def test_more_samples_than_run_at_once(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    asked = requests(prompts[:1], num_samples=10)
    with fed_tokens(model) as counts:
        found = RolloutEngine(model, 4, native=False).generate(asked, return_routes=True)
    assert len(found[0]) == 10
    assert max(counts) <= 4
    assert_same(model, asked, found, RolloutEngine(model, 64).generate(asked, return_routes=True))


def test_stop_tokens_end_a_turn_and_are_part_of_it(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    free, early = [GenerationRequest(prompts[1], 1, GREEDY)], []
    ((unstopped,),) = RolloutEngine(model).generate(free)
    for stop in dict.fromkeys(unstopped.response_ids):
        sampling = SamplingParams(temperature=0.0, max_tokens=16, stop_token_ids=(511, stop))
        ((sample,),) = RolloutEngine(model).generate([GenerationRequest(prompts[1], 1, sampling)])
        end = unstopped.response_ids.index(stop) + 1
        assert sample.response_ids == unstopped.response_ids[:end]
        assert sample.finish_reason == "stop"
        early.append(end)
    assert min(early) == 1


def test_a_stop_token_at_the_very_end_counts_as_a_stop(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    ((free,),) = RolloutEngine(model).generate([GenerationRequest(prompts[1], 1, GREEDY)])
    end = free.response_ids.index(free.response_ids[5]) + 1
    sampling = SamplingParams(temperature=0.0, max_tokens=end, stop_token_ids=(free.response_ids[5],))
    ((sample,),) = RolloutEngine(model).generate([GenerationRequest(prompts[1], 1, sampling)])
    assert (len(sample.response_ids), sample.finish_reason) == (end, "stop")


def test_requests_have_their_own_limits(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    asked = [
        GenerationRequest(p, n, SamplingParams(max_tokens=limit, seed=n))
        for p, n, limit in zip(prompts, (1, 3, 2, 1, 2, 1, 4), (1, 9, 4, 20, 1, 2, 5), strict=True)
    ]
    finished: list[int] = []
    samples = RolloutEngine(model, 5).generate(asked, on_finished=finished.append)
    assert [len(group) for group in samples] == [r.num_samples for r in asked]
    for request, group in zip(asked, samples, strict=True):
        assert {len(s.response_ids) for s in group} == {request.sampling.max_tokens}
    assert sum(finished) == 14


def test_routes_cover_what_was_fed(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    """One byte for each fed token, MoE layer and chosen expert, equal to those of a forward over the whole."""
    samples = RolloutEngine(model, 5).generate(requests(prompts), return_routes=True)
    for prompt, group in zip(prompts, samples, strict=True):
        for sample in group:
            assert isinstance(sample.routes, bytes)
            assert len(sample.routes) == (len(prompt) + len(sample.response_ids) - 1) * 2 * 3
            assert max(sample.routes) < 16
            with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
                model(**pack([prompt + sample.response_ids], torch.device("cpu")).model_inputs())
            flips = find_flips(recorded.routes[0], recorded.gaps[0], sample.routes)
            assert flips.root_gap < 1e-4  # nothing but a tie may have gone the other way
    without = RolloutEngine(model).generate(requests(prompts[:1]))
    assert [s.routes for s in without[0]] == [None] * 3


def test_trained_weights_are_used_at_once(model: Dots1ForCausalLM, prompts: list[list[int]]) -> None:
    engine = RolloutEngine(model)
    before = ids(engine.generate(requests(prompts[:2])))
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert ids(engine.generate(requests(prompts[:2]))) != before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", ["dots_align_packed", "sdpa"])
def test_the_model_is_left_as_it_was(
    model: Dots1ForCausalLM, prompts: list[list[int]], training: bool, implementation: str
) -> None:
    model.train(training)
    model.config._attn_implementation = implementation
    with torch.no_grad():
        wanted = model(torch.tensor(prompts[:1])).logits
    RolloutEngine(model).generate(requests(prompts[:2]))

    def fail(_: int) -> None:
        raise RuntimeError("the user pressed a key")

    with pytest.raises(RuntimeError, match="pressed a key"):
        RolloutEngine(model).generate(requests(prompts[:2]), on_finished=fail)
    assert model.config._attn_implementation == implementation
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(prompts[:1])).logits, wanted)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (GenerationRequest([]), "request 1: the prompt is empty"),
        (
            GenerationRequest([1] * 250, 1, SamplingParams(max_tokens=7)),
            "request 1: prompt of 250 tokens plus max_tokens 7 exceeds the context",
        ),
        (GenerationRequest([1, 512]), "request 1: a token id lies outside the vocabulary (0 to 511)"),
        (GenerationRequest([-1]), "request 1: a token id lies outside the vocabulary"),
        (
            GenerationRequest([1], 1, SamplingParams(max_tokens=0)),
            "request 1: max_tokens (0) and num_samples (1) must be at least 1",
        ),
        (GenerationRequest([1], 0), "num_samples (0) must be at least 1"),
        (GenerationRequest([1], 1, SamplingParams(temperature=-1.0)), "request 1: temperature is -1.0; give a number"),
        (GenerationRequest([1], 1, SamplingParams(temperature=float("nan"))), "request 1: temperature is nan"),
        (GenerationRequest([1], 1, SamplingParams(top_p=0.0)), "request 1: top_p is 0.0; give a share above 0"),
        (GenerationRequest([1], 1, SamplingParams(min_p=1.5)), "request 1: min_p is 1.5; give a share from 0 to 1"),
        (GenerationRequest([1], 1, SamplingParams(top_k=-1)), "request 1: top_k is -1; give a count"),
        (
            GenerationRequest([1], 1, started=(Sample([2], [0.0], [0.0], "abort"),) * 2),
            "request 1: 2 samples were started, but num_samples is 1",
        ),
    ],
)
def test_an_impossible_request_is_refused_and_the_others_are_done(
    model: Dots1ForCausalLM, request_: GenerationRequest, told: str
) -> None:
    fine = [GenerationRequest([1, 2, 3], 2), GenerationRequest([4, 5], 1)]
    with pytest.raises(RequestErrors) as caught:
        RolloutEngine(model).generate([fine[0], request_, fine[1]])
    assert told in str(caught.value)
    assert list(caught.value.errors) == [1]
    wanted = RolloutEngine(model).generate(fine)
    assert caught.value.samples == [wanted[0], [], wanted[1]]


def test_a_prompt_and_answer_that_fill_the_context(model: Dots1ForCausalLM) -> None:
    ((sample,),) = RolloutEngine(model).generate([GenerationRequest([1] * 249, 1, SamplingParams(max_tokens=7))])
    assert len(sample.response_ids) == 7


def test_no_requests_and_no_sequences(model: Dots1ForCausalLM) -> None:
    assert RolloutEngine(model).generate([]) == []
    with pytest.raises(ValueError, match="max_num_sequences must be at least 1, got 0"):
        RolloutEngine(model, 0)


@pytest.mark.parametrize(
    "seed",
    [
        0,
        20_241_123,
    ],
)
def test_any_seed_of_a_recipe_can_be_sampled_with(model: Dots1ForCausalLM, seed: int) -> None:
    """The RL loop gives each prompt the seed `(recipe.seed << 40) + position`."""
    RolloutEngine(model).generate([GenerationRequest([1], 1, SamplingParams(max_tokens=1, seed=(seed << 40) + 5))])
