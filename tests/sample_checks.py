"""Whether two engines said the same, but for ties that rounding decides."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Dots1ForCausalLM

from dots_align.model.packed import pack
from dots_align.model.router import find_flips, record_routes
from dots_align.rollout.sampling import sample_keys, uniforms
from dots_align.types import GenerationRequest, Sample

TIE = 3e-6
"""A difference in the router's scores, or in probability, below which rounding may choose either way."""


def is_a_tie(model: Dots1ForCausalLM, request: GenerationRequest, index: int, one: Sample, other: Sample) -> bool:
    """Whether two samples number `index` part only because rounding decided: between two experts, or, where the random
    number falls on the edge between them, between two tokens.
    """
    ids = list(zip(one.response_ids, other.response_ids, strict=False))
    shared = next((i for i, (a, b) in enumerate(ids) if a != b), len(ids))
    tokens = request.prompt_ids + one.response_ids[:shared]  # what both had read when they chose
    with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
        logits = model(**pack([tokens], torch.device("cpu")).model_inputs()).logits[0]
    size = recorded.routes[0].numel()
    flips = [find_flips(recorded.routes[0], recorded.gaps[0], (s.routes or b"")[:size]) for s in (one, other)]
    if any(f.num_roots for f in flips):
        return all(f.root_gap < TIE for f in flips)
    return shared < len(ids) and _on_the_edge(logits[-1].double(), request, index, shared, sorted(ids[shared]))


def _on_the_edge(
    logits: torch.Tensor, request: GenerationRequest, index: int, position: int, tokens: list[int]
) -> bool:
    """Whether the random number for a position falls on the edge between two tokens (temperature 1, no filter)."""
    key = sample_keys(torch.tensor([request.sampling.seed]), torch.tensor([index]))
    drawn = float(uniforms(key, torch.tensor([position])))
    cdf = logits.softmax(-1).cumsum(-1)
    low, high = tokens
    return abs(float(cdf[low]) - drawn) < TIE and abs(float(cdf[high - 1]) - drawn) < TIE


def _experts(model: Dots1ForCausalLM, sample: Sample) -> bytes:
    """The routes, with the experts of a token and layer in rising order: engines name them in different ones."""
    routes = np.frombuffer(sample.routes or b"", np.uint8).reshape(-1, model.config.num_experts_per_tok)
    return np.sort(routes).tobytes()


def assert_same(
    model: Dots1ForCausalLM, requests: list[GenerationRequest], found: list[list[Sample]], wanted: list[list[Sample]]
) -> None:
    for request, ours, theirs in zip(requests, found, wanted, strict=True):
        assert len(ours) == len(theirs) == request.num_samples
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.response_ids != b.response_ids:
                assert is_a_tie(model, request, index, a, b)
                continue
            assert a.finish_reason == b.finish_reason
            if _experts(model, a) == _experts(model, b):
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
                np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=1e-5)
            else:
                assert is_a_tie(model, request, index, a, b)


def against_one_forward(
    model: Dots1ForCausalLM, requests: list[GenerationRequest], samples: list[list[Sample]]
) -> tuple[float, int, int]:
    """Samples against a plain forward over each: (largest difference in log-probability where no route differs before,
    tokens compared, tokens behind a route that differs). Every difference in routes has to be a tie.
    """
    largest, compared, flipped = 0.0, 0, 0
    for request, group in zip(requests, samples, strict=True):
        for sample in group:
            with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
                inputs = pack([request.prompt_ids + sample.response_ids], torch.device("cpu")).model_inputs()
                logits = model(**inputs).logits[0]
            flips = find_flips(recorded.routes[0], recorded.gaps[0], sample.routes or b"")
            assert flips.root_gap < TIE
            first = len(request.prompt_ids) - 1
            wanted = logits[first:-1].log_softmax(-1).gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
            same = ~flips.affected[first:]
            difference = (wanted - torch.tensor(sample.logprobs))[same].abs()
            largest = max(largest, float(difference.max())) if len(difference) else largest
            compared, flipped = compared + int(same.sum()), flipped + int((~same).sum())
    return largest, compared, flipped
