"""Whether two engines said the same, but for ties between experts that rounding decides."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Dots1ForCausalLM

from dots_align.model.packed import pack
from dots_align.model.router import find_flips, record_routes
from dots_align.types import GenerationRequest, Sample

TIE = 1e-6
"""A difference in the router's scores below which rounding may choose either expert."""


def is_a_tie(model: Dots1ForCausalLM, prompt: list[int], one: Sample, other: Sample) -> bool:
    """Whether two samples part only because rounding decided between two experts or two tokens."""
    ids = list(zip(one.response_ids, other.response_ids, strict=False))
    shared = next((i for i, (a, b) in enumerate(ids) if a != b), len(ids))
    with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
        model(**pack([prompt + one.response_ids[: shared + 1]], torch.device("cpu")).model_inputs())
    gaps = recorded.gaps[0]
    assert one.routes is not None
    flips = [find_flips(recorded.routes[0], gaps, s.routes or b"") for s in (one, other)]
    return all(f.root_gap < TIE for f in flips) and any(f.num_roots for f in flips)


def assert_same(
    model: Dots1ForCausalLM, requests: list[GenerationRequest], found: list[list[Sample]], wanted: list[list[Sample]]
) -> None:
    for request, ours, theirs in zip(requests, found, wanted, strict=True):
        assert len(ours) == len(theirs) == request.num_samples
        for a, b in zip(ours, theirs, strict=True):
            if a.response_ids != b.response_ids:
                assert is_a_tie(model, request.prompt_ids, a, b)
                continue
            assert a.finish_reason == b.finish_reason
            if a.routes == b.routes:
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
                np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=1e-5)
            else:
                assert is_a_tie(model, request.prompt_ids, a, b)


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
