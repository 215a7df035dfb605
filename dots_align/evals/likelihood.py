"""How likely a model finds given continuations of given texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dots_align.model.expert_parallel import is_sharded, reshard
from dots_align.model.logprobs import model_token_scores
from dots_align.model.packed import micro_batches, pack
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
    """Scores continuations, in forwards of about `max_tokens` tokens without padding.

    Continuations that differ in their last token alone, such as those of one token, share one reading.

    Args:
        model: of a sharded one every process has its own questions, or none, and reads to the end.
        questions: a context and its continuations, token ids; neither is empty.

    Yields:
        (place in the list, a `Likelihood` for each continuation), in order of falling length.
    """
    rows = [(place, row) for place, question in enumerate(questions) for row in _rows(*question)]
    batches = micro_batches([len(row.ids) for _, row in rows], max_tokens)
    most = max(gather_objects(len(batches))) if is_sharded(model) else len(batches)
    found: dict[int, dict[int, Likelihood]] = {}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for number in range(most):
            # A process that has no work left takes part with a token of its own: the others wait for its experts.
            members = [rows[i] for i in batches[number]] if number < len(batches) else [(-1, _Row([0], {-1: [0]}))]
            for place, index, likelihood in _forward(model, members, device):
                if place >= 0:
                    found.setdefault(place, {})[index] = likelihood
            for place in {place for place, _ in members if place >= 0}:
                if len(found[place]) == len(questions[place][1]):
                    answers = found.pop(place)
                    yield place, [answers[i] for i in sorted(answers)]
    finally:
        model.train(training)
        reshard(model)


@dataclass(frozen=True)
class _Row:
    """A sequence to read, and by index the continuations that are scored on it: each begins behind `ids[:start]`."""

    ids: list[int]
    continuations: dict[int, list[int]]
    start: int = 1


def _rows(context: list[int], continuations: list[list[int]]) -> Iterator[_Row]:
    """Readings that serve all continuations: the last token of one need not be read, its place only be asked for."""
    assert context
    assert all(continuations)
    heads: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for index, tokens in enumerate(continuations):
        heads.setdefault(tuple(tokens[:-1]), {})[index] = tokens
    for head, served in heads.items():
        yield _Row([*context, *head], served, len(context))


def _forward(
    model: Any, members: Iterable[tuple[int, _Row]], device: torch.device
) -> Iterator[tuple[int, int, Likelihood]]:
    positions, targets, spans, offset, sequences = [], [], [], 0, []
    for place, row in members:
        for index, tokens in row.continuations.items():
            spans.append((place, index, len(tokens)))
            first = offset + row.start - 1
            positions += range(first, first + len(tokens))
            targets += tokens
        sequences.append(row.ids)
        offset += len(row.ids)
    at, wanted = (torch.tensor(values, device=device) for values in (positions, targets))
    scores = model_token_scores(model, pack(sequences, device).model_inputs(), at, wanted)
    assert scores.is_top1 is not None
    logprobs, top = scores.logprobs.double().cpu(), scores.is_top1.cpu()
    begin = 0
    for place, index, length in spans:
        part = slice(begin, begin + length)
        begin += length
        yield place, index, Likelihood(float(logprobs[part].sum()), bool(top[part].all()), length)
