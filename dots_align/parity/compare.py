"""An engine against the definition: logits, chosen experts, rendered prompts, the end of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dots_align.export.verify_gguf import MAX_MEDIAN_LOGPROB_DIFFERENCE
from dots_align.model.router import find_flips
from dots_align.parity.observation import EXACT, Asked, Observation, Question, logprobs_of

# In fp32, of any logit (or log-prob) before which all chose the same experts; what remains is the order of sums.
TOLERANCE = 1e-4
# Rounding is relative: beyond this size of the largest logit more is allowed.
LARGE_LOGIT = 10.0
# Two experts whose scores are closer may change places by rounding.
TIE = 1e-5


def tolerance_of(precision: str, reference: Observation | None = None) -> float:
    """What rounding may do; of EXACT engines to the largest difference, of others to the median of log-probs."""
    if precision != EXACT:
        return MAX_MEDIAN_LOGPROB_DIFFERENCE.get(precision, max(MAX_MEDIAN_LOGPROB_DIFFERENCE.values()))
    logits = (reference.logits if reference is not None else None) or []
    largest = max((float(x.abs().max()) for x in logits), default=0.0)
    return TOLERANCE * max(1.0, largest / LARGE_LOGIT)


@dataclass
class Comparison:
    """One engine's row. None stands for what it cannot say.

    `max_difference` is over the tokens before which (themselves included) all chose the same experts, `mean_difference`
    and `median_difference` over all; of logits, or of log-probs where `unit` says so. `median_logprob_difference` is of
    the given tokens. `num_changed` of `num_choices` choices (a token in a layer) fell on other experts; of those that
    no other explains, `num_ties` were near-ties and `num_other` were not. `problems` are what is wrong, `causes` the
    names of the mistakes that explain it. `late` as in `Observation`.
    """

    name: str
    precision: str = EXACT
    unit: str = "logit"
    num_tokens: int = 0
    num_clean: int = 0
    max_difference: float | None = None
    mean_difference: float | None = None
    median_difference: float | None = None
    median_logprob_difference: float | None = None
    top1_agreement: float | None = None
    num_choices: int | None = None
    num_changed: int | None = None
    num_ties: int = 0
    num_other: int = 0
    template_equal: bool | None = None
    stop_ids: list[int] | None = None
    stopped: bool | None = None
    late: bool = False
    skipped: str | None = None
    logits_differ: bool = False
    problems: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def compare(name: str, asked: Asked, reference: Observation, found: Observation) -> Comparison:
    """Everything but the cause."""
    row = Comparison(name, found.precision, unit="logit" if found.logits is not None else "log-prob", late=found.late)
    clean = _clean_tokens(row, reference, found)
    _compare_numbers(row, asked, reference, found, clean)
    _compare_text(row, asked, found)
    _compare_stops(row, asked, found)
    return row


def differences(asked: Asked, reference: Observation, found: Observation) -> list[torch.Tensor]:
    """For each question and position the largest difference of a logit [T], or that of the log-prob [T - 1]."""
    assert reference.logits is not None
    if found.logits is not None:
        # A server may have a head with rows for padding.
        pairs = zip(reference.logits, found.logits, strict=True)
        return [(ours - theirs[:, : ours.shape[1]]).abs().amax(-1) for ours, theirs in pairs]
    assert found.logprobs is not None
    pairs = zip(reference.logits, asked.questions, strict=True)
    ours = (logprobs_of(logits, question.token_ids, found.late) for logits, question in pairs)
    return [(a - b).abs() for a, b in zip(ours, found.logprobs, strict=True)]


def aligned(asked: Asked, reference: Observation, found: Observation) -> Observation:
    """What a server says, with `late` set where that is what its log-probs are nearer to: llama-cpp-python 0.3.36 tells
    a prompt's so. They prove as much that way.
    """
    if found.logits is not None or found.logprobs is None:
        return found
    late = replace(found, late=True)
    return late if distance(asked, reference, late) < distance(asked, reference, found) / 2 else found


def distance(asked: Asked, reference: Observation, found: Observation) -> float:
    """Median over the positions: a near-tie that fell the other way moves some of them, a mistake all."""
    every = torch.cat(differences(asked, reference, found))
    every = every[~every.isnan()]
    return float(every.median()) if len(every) else float("nan")


def _clean_tokens(row: Comparison, reference: Observation, found: Observation) -> list[torch.Tensor]:
    """For each question [T] bool: no token up to here chose other experts."""
    assert reference.routes is not None
    assert reference.gaps is not None
    if found.routes is None:
        return [~(gaps < TIE).any(-1).cummax(0).values for gaps in reference.gaps]
    clean, changed, choices = [], 0, 0
    for ours, gaps, theirs in zip(reference.routes, reference.gaps, found.routes, strict=True):
        if ours.shape != theirs.shape:
            row.problems.append(f"chose experts of shape {list(theirs.shape)}, not {list(ours.shape)}")
            return [torch.ones(len(routes), dtype=torch.bool) for routes in reference.routes]
        flips = find_flips(ours, gaps, theirs.contiguous().numpy().tobytes())
        clean.append(~flips.affected)
        changed, choices = changed + int(flips.differ.sum()), choices + flips.differ.numel()
        if flips.root_gap < TIE:
            row.num_ties += flips.num_roots
        else:
            row.num_other += flips.num_roots
    row.num_changed, row.num_choices = changed, choices
    if row.num_other and row.precision == EXACT:
        row.problems.append(f"{row.num_other} tokens chose other experts where it is no near-tie")
    return clean


def _compare_numbers(
    row: Comparison, asked: Asked, reference: Observation, found: Observation, clean: list[torch.Tensor]
) -> None:
    if found.logits is None and found.logprobs is None:
        return
    by_question = differences(asked, reference, found)
    every = torch.cat(by_question)
    agreeing = torch.cat([d[c[: len(d)]] for d, c in zip(by_question, clean, strict=True)])
    if found.logits is None:  # a server may not tell all of them; a logit that is no number is a mistake
        every, agreeing = every[~every.isnan()], agreeing[~agreeing.isnan()]
        if not len(every):
            row.problems.append("tells no log-probs of prompts (echo with logprobs), so nothing was compared")
            return
    row.num_tokens, row.num_clean = len(every), len(agreeing)
    row.max_difference = float(agreeing.max()) if len(agreeing) else None
    row.mean_difference, row.median_difference = float(every.mean()), float(every.median())
    if found.logits is not None:
        row.top1_agreement = _top1(reference.logits, found.logits, clean)
    allowed = tolerance_of(row.precision, reference)
    exact = row.precision == EXACT
    row.median_logprob_difference = _median_logprob(asked, reference, found)
    seen = row.max_difference if exact else row.median_logprob_difference
    # Where most tokens went to other experts, those that did not prove nothing.
    hidden = exact and 2 * row.num_clean < row.num_tokens
    row.logits_differ = hidden or seen is None or not seen <= allowed
    if row.logits_differ:
        kind = f"{row.unit}s differ by up to" if exact else "log-probs differ (median) by"
        row.problems.append(f"{kind} {float('nan') if seen is None else seen:.2g}, at most {allowed:g} is rounding")
    elif exact and row.top1_agreement not in (None, 1.0):
        row.problems.append(f"only {row.top1_agreement:.2%} of the likeliest tokens agree")


def _median_logprob(asked: Asked, reference: Observation, found: Observation) -> float:
    if found.logits is not None:
        given = zip(found.logits, asked.questions, strict=True)
        found = Observation(logprobs=[logprobs_of(logits, q.token_ids) for logits, q in given])
    return distance(asked, reference, found)


def _top1(
    ours: Sequence[torch.Tensor] | None, theirs: Sequence[torch.Tensor], clean: Sequence[torch.Tensor]
) -> float | None:
    """Share of clean positions whose likeliest token is the same; two as likely as each other, up to rounding, are."""
    assert ours is not None
    agreed, count = 0, 0
    for a, b, keep in zip(ours, theirs, clean, strict=True):
        best, of_theirs = a.amax(-1), a.gather(-1, b[:, : a.shape[1]].argmax(-1, keepdim=True))[:, 0]
        agreed += int((best - of_theirs < TOLERANCE)[keep].sum())
        count += int(keep.sum())
    return agreed / count if count else None


def _compare_text(row: Comparison, asked: Asked, found: Observation) -> None:
    for question, ids in zip(asked.questions, found.rendered, strict=False):
        if ids is not None:
            ours = list(question.token_ids)
            at = next((i for i, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), min(len(ours), len(ids)))
            in_front = " (a token is added in front)" if ids[1:] == ours else ""
            _note_text(row, question, ids == ours, f"as other tokens, first at position {at}{in_front}")
    for question, count in zip(asked.questions, found.num_rendered, strict=False):
        if count is not None:
            ours = len(question.token_ids)
            _note_text(row, question, count == ours, f"as {count} tokens, the checkpoint's tokenizer as {ours}")


def _note_text(row: Comparison, question: Question, equal: bool, difference: str) -> None:
    cause = "other chat template" if question.messages else "other tokenizer"
    row.template_equal = row.template_equal is not False and equal
    if not equal and cause not in row.causes:
        row.problems.append(f"reads {question.name} {difference}")
        row.causes.append(cause)


def _compare_stops(row: Comparison, asked: Asked, found: Observation) -> None:
    if found.stop_ids is not None:
        row.stop_ids = sorted(found.stop_ids)
        if asked.end_of_turn not in found.stop_ids:
            row.problems.append(f"stops at {row.stop_ids}, an answer ends with {asked.end_of_turn}")
    row.stopped = found.stopped
    if found.stopped is False:
        row.problems.append(f"goes on after token {asked.end_of_turn}, which ends an answer")
    if found.stopped is False or (found.stop_ids is not None and asked.end_of_turn not in found.stop_ids):
        row.causes.append("wrong stop token")
