"""How likely a model finds given continuations of given texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dots_align.model.expert_parallel import is_sharded, reshard
from dots_align.model.logprobs import model_token_scores
from dots_align.model.packed import micro_batches, pack_shared
from dots_align.runtime import gather_objects

MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: the sum of its tokens' log-probabilities, whether each is the likeliest, and how many there
    are.
    """

    logprob: float
    greedy: bool
    num_tokens: int


def likelihoods(
    model: Any, questions: Sequence[tuple[list[int], list[list[int]]]], max_tokens: int = MICRO_BATCH_TOKENS
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Scores continuations, in forwards of about `max_tokens` tokens without padding, which read each context once.

    Args:
        model: of a sharded one every process has its own questions, or none, and reads to the end.
        questions: a context and its continuations, token ids; neither is empty.

    Yields:
        (place in the list, a `Likelihood` for each continuation), in any order.
    """
    assert all(context and continuations and all(continuations) for context, continuations in questions)
    lengths = [len(context) + sum(map(len, _heads(found))) for context, found in questions]
    batches = micro_batches(lengths, max_tokens)
    most = max(gather_objects(len(batches))) if is_sharded(model) else len(batches)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for number in range(most):
            # A process that has no work left takes part with a token of its own: the others wait for its experts.
            members = batches[number] if number < len(batches) else []
            found = _forward(model, [questions[place] for place in members] or [([0], [[0]])], device)
            yield from zip(members, found, strict=False)
    finally:
        model.train(training)
        reshard(model)


def _heads(continuations: list[list[int]]) -> list[tuple[int, ...]]:
    """What has to be read behind the context: of each continuation all but its last token, whose probability alone is
    asked for. Those that differ in nothing else share a head, and a token alone has none.
    """
    return list(dict.fromkeys(tuple(tokens[:-1]) for tokens in continuations if len(tokens) > 1))


def _forward(
    model: Any, questions: Sequence[tuple[list[int], list[list[int]]]], device: torch.device
) -> list[list[Likelihood]]:
    heads = [_heads(continuations) for _, continuations in questions]
    contexts = [context for context, _ in questions]
    batch, places = pack_shared(contexts, [[list(h) for h in some] or [[]] for some in heads], device)
    positions, targets = [], []
    for (context, continuations), some, rows in zip(questions, heads, places, strict=True):
        for tokens in continuations:
            row = rows[some.index(tuple(tokens[:-1]))] if len(tokens) > 1 else rows[0][: len(context)]
            positions.append(row[len(context) - 1 :])  # the state before a token predicts it
            targets += tokens
    wanted = torch.tensor(targets, device=device)
    scores = model_token_scores(model, batch.model_inputs(), torch.cat(positions), wanted)
    assert scores.is_top1 is not None
    sizes = [len(row) for row in positions]
    parts = zip(scores.logprobs.double().cpu().split(sizes), scores.is_top1.cpu().split(sizes), strict=True)
    found = [Likelihood(float(logprobs.sum()), bool(top.all()), len(top)) for logprobs, top in parts]
    rest = iter(found)
    return [[next(rest) for _ in continuations] for _, continuations in questions]
