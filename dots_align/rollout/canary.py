"""A canary: what the sender of weights computes on a fixed prompt, to be compared with what their receiver computes.

Checksums prove that bits arrived. They cannot know that the receiver's configuration scales the experts by another
factor, or that what was sent was not what trains; the log-probabilities of a prompt do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dots_align.model.expert_parallel import compute_dtype, reshard
from dots_align.model.logprobs import IGNORED, model_logprobs
from dots_align.model.packed import pack
from dots_align.model.router import find_flips, moe_layers, record_routes

LENGTH = 64


@dataclass(frozen=True)
class Tolerance:
    """How far two forwards in some dtype may differ: `clean`, the largest difference in log-prob of a token before
    which all chose the same experts; `mean`, over all tokens; `tie`, the largest score gap between two experts that
    rounding may have swapped.
    """

    clean: float
    mean: float
    tie: float


# In bf16 about every token is behind a swap somewhere, of gaps up to 0.004; untrained models of 4 and 12 layers were
# 0.008 and 0.03 off in the mean, and 0.1 or more with the routing bias lost or the experts scaled wrongly.
TOLERANCES = {torch.float32: Tolerance(1e-4, 0.05, 1e-5), torch.bfloat16: Tolerance(0.1, 0.08, 0.02)}


@dataclass(frozen=True)
class Canary:
    """A prompt of n tokens, the log-probs [n - 1] of all but the first, the experts they chose (as `Sample.routes`)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    routes: bytes
    dtype: torch.dtype  # of the activations


def canary_prompt(vocabulary: int) -> tuple[int, ...]:
    """Ids spread over the vocabulary, the same for everyone; text would need a tokenizer."""
    return tuple((7919 * i + 13) % vocabulary for i in range(LENGTH))


@torch.no_grad()
def _forward(model: Any, token_ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs [n - 1], routes [n, layers, k] and their score gaps [n, layers] of one plain forward, on the host."""
    ids = torch.tensor([*token_ids[1:], IGNORED], device=next(model.parameters()).device)[None]
    training = model.training
    model.eval()
    try:
        with record_routes(model, with_gaps=True) as recorded:
            scores = model_logprobs(model, pack([list(token_ids)], ids.device).model_inputs(), ids)
    finally:
        model.train(training)
        reshard(model)
    if not moe_layers(model):
        empty = torch.empty(len(token_ids), 0, 0)
        return scores.logprobs.cpu(), empty.byte(), empty[..., 0]
    (routes,), (gaps,) = recorded.routes, recorded.gaps
    return scores.logprobs.cpu(), routes.cpu(), gaps.cpu()


def make_canary(model: Any) -> Canary:
    """What `model` computes on `canary_prompt`; of a sharded model all its processes call it."""
    prompt = canary_prompt(model.config.vocab_size)
    logprobs, routes, _ = _forward(model, prompt)
    return Canary(prompt, tuple(logprobs.tolist()), routes.numpy().tobytes(), compute_dtype(model))


def canary_problem(model: Any, canary: Canary) -> str | None:
    """What is wrong with the model if it is meant to be the one that sent `canary`; None if nothing is."""
    tolerance = TOLERANCES[max(canary.dtype, compute_dtype(model), key=lambda dtype: torch.finfo(dtype).eps)]
    logprobs, routes, gaps = _forward(model, canary.token_ids)
    differences = (logprobs - torch.tensor(canary.logprobs)).abs()
    flips = find_flips(routes, gaps, canary.routes)
    clean = differences[~flips.affected[:-1]]
    largest, mean = float(clean.max()) if len(clean) else 0.0, float(differences.mean())
    if not largest <= tolerance.clean:
        return f"a canary token's log-prob differs by {largest:.2g} (at most {tolerance.clean:g} is rounding)"
    if flips.root_gap > tolerance.tie:
        return (
            f"{flips.num_roots} canary tokens chose other experts, with score gaps up to {flips.root_gap:.2g} (at most "
            f"{tolerance.tie:g} is rounding)"
        )
    if not mean <= tolerance.mean:
        return f"the canary's log-probs differ by {mean:.2g} in the mean (at most {tolerance.mean:g} is rounding)"
    return None
