"""Log-probabilities of given tokens, in chunks: the [tokens, vocabulary] matrix never exists as a whole.

A chunk's logits live in one fp32 buffer, which backward computes again and turns into their gradient in place. From
forward to backward only one number per token is kept; where all logits together are small they are kept instead, which
saves a fourth of the head's products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dots_align.model.dots1 import lm_head

CHUNK_BYTES = 256 * 2**20  # of the [chunk, vocabulary] fp32 logits
MIN_CHUNK_TOKENS = 64
KEPT_BYTES = 32 * 2**20  # of logits that backward need not compute again
IGNORED = -100  # stands where there is no target, as in transformers' labels


@dataclass(frozen=True)
class TokenScores:
    """What a head says about N targets.

    `logprobs` [N] fp32, differentiable. Not differentiable, and None unless asked for: `entropy` [N] fp32 in nats,
    `mean_logits` [N] fp32 (over the vocabulary), `is_top1` [N] bool (no token is likelier, and of equally likely ones
    none comes earlier in the vocabulary).
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def chunks(num_tokens: int, vocabulary: int, chunk_bytes: int) -> Iterator[slice]:
    """Rows in equal chunks whose fp32 logits take about `chunk_bytes`, or the MIN_CHUNK_TOKENS that a matrix product
    needs to be efficient.
    """
    most = max(MIN_CHUNK_TOKENS, chunk_bytes // (4 * vocabulary))
    count = -(-num_tokens // most)
    for number in range(count):
        yield slice(number * num_tokens // count, (number + 1) * num_tokens // count)


def are_kept(num_tokens: int, vocabulary: int, chunk_bytes: int) -> bool:
    """Whether backward has the logits again, all in one chunk, instead of computing them again."""
    return 0 < 4 * num_tokens * vocabulary <= min(KEPT_BYTES, chunk_bytes)


def _chunk_logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, chunk_bytes: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their logits [rows, V] fp32, divided by the temperature. The next chunk overwrites them."""
    buffer = None
    for rows in chunks(len(hidden), len(weight), chunk_bytes):
        states = hidden[rows].to(weight.dtype)
        if buffer is None or len(buffer) < len(states):
            buffer = torch.empty(len(states), len(weight), dtype=torch.float32, device=hidden.device)
        logits = buffer[: len(states)]
        if weight.dtype == torch.float32:
            torch.mm(states, weight.t(), out=logits)
        elif weight.is_cuda:  # logits in bf16 would be off by 0.03 at a magnitude of 10
            torch.mm(states, weight.t(), out_dtype=torch.float32, out=logits)
        else:  # CPUs have no product that widens
            logits.copy_(states @ weight.t())
        yield rows, logits if temperature == 1.0 else logits.div_(temperature)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` in fp32: rounding each chunk's product to bf16 would add up to a bias."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class _ChunkedLogProbs(torch.autograd.Function):
    """See `score_tokens`. Saved for backward: the inputs, the logarithm of each row's sum of exponentials, and of few
    logits their exponentials with their sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        with_entropy: bool,
        with_metrics: bool,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor | None, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        picked, log_sum = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        entropy = torch.empty_like(picked) if with_entropy else None
        mean = torch.empty_like(picked) if with_metrics else None
        is_top1 = torch.empty_like(targets, dtype=torch.bool) if with_metrics else None
        keeps = any(ctx.needs_input_grad) and are_kept(len(targets), len(head), chunk_bytes)
        kept: tuple[torch.Tensor | None, ...] = None, None
        with torch.autocast(device, enabled=False):
            for rows, logits in _chunk_logits(hidden, head.to(dtype), temperature, chunk_bytes):
                picked[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1)
                if mean is not None and is_top1 is not None:
                    mean[rows] = logits.mean(-1)
                    is_top1[rows] = logits.argmax(-1) == targets[rows]
                log_sum[rows], weights, total = _log_sum(logits, None if entropy is None else entropy[rows])
                if keeps:
                    kept = weights, total
                del weights, total  # as large as a chunk: not beside the next one's
        ctx.save_for_backward(hidden, head, targets, log_sum, *kept)
        ctx.settings = dtype, temperature, chunk_bytes
        ctx.mark_non_differentiable(*(x for x in (entropy, mean, is_top1) if x is not None))
        return picked - log_sum, entropy, mean, is_top1

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the parameters' names
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, head, targets, log_sum, weights, total = ctx.saved_tensors
        dtype, temperature, chunk_bytes = ctx.settings
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(dtype)
            again = _chunk_logits(hidden, weight, temperature, chunk_bytes)
            for rows, logits in again if weights is None else [(slice(None), weights)]:
                share = (grads[0][rows] / temperature)[:, None]
                # d(log p_target) / d(logit_j) = [j = target] - p_j
                if weights is None:
                    d_logits = logits.sub_(log_sum[rows, None]).exp_().mul_(-share)
                else:
                    d_logits = weights * (-share / total[:, None])
                d_logits.scatter_add_(-1, targets[rows, None], share)
                d_logits = d_logits.to(dtype)
                if d_hidden is not None:
                    d_hidden[rows] = d_logits @ weight
                if d_head is not None:
                    _add_product(d_head, d_logits.t(), hidden[rows].to(dtype))
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None, None, None, None


def _log_sum(logits: torch.Tensor, entropy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log of each row's sum of exponentials, and the exponentials of the distances from its largest number, with their
    sum. Fills `entropy` if given, overwrites the logits.
    """
    best = logits.amax(-1)
    shifted = logits.sub_(best[:, None])
    weights = shifted.exp_() if entropy is None else shifted.exp()
    total = weights.sum(-1)
    if entropy is not None:
        entropy.copy_(total.log() - shifted.mul_(weights).sum(-1) / total)
    return best + total.log(), weights, total


def score_tokens(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
    with_metrics: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """Scores of each target under a language-model head without bias.

    Args:
        hidden: [N, hidden] final hidden states, one before each target.
        head: [V, hidden] weight. Products are in its dtype, or in autocast's; the hidden states are cast to that.
        targets: [N] token ids.
        temperature: divides the logits, in fp32.
        with_entropy: also the entropy; costs a second [chunk, V] buffer.
        with_metrics: also `mean_logits` and `is_top1`.
        chunk_bytes: size of the fp32 logits that exist at one time.
    """
    found = _ChunkedLogProbs.apply(hidden, head, targets, temperature, with_entropy, with_metrics, chunk_bytes)
    assert isinstance(found, tuple)
    return TokenScores(*found)


def model_logprobs(
    model: nn.Module,
    inputs: dict[str, Any],
    targets: torch.Tensor,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
    with_metrics: bool = False,
    positions: torch.Tensor | None = None,
) -> TokenScores:
    """One forward of a causal language model whose head answers with log-probabilities instead of logits.

    The head is called by the model itself, hooks and all, so that whatever gathers its weight for the time of its
    forward and backward (FSDP2, ZeRO-3) does so here. Works on the bare model, under adapters and inside wrappers that
    hold the model as `module`.

    Args:
        inputs: keyword arguments of the model's forward, without labels.
        targets: [B, T] ids of the tokens that the positions of `inputs` predict (labels moved one to the left);
            IGNORED where nothing is asked for. Only the others go through the head.
        temperature, with_entropy, with_metrics: as in `score_tokens`.
        positions: [N] which of the B * T positions predict the `targets`, which then are [N]; one may predict several.

    Returns:
        scores of the N targets that are not IGNORED, in row-major order, or of `positions`, in order.
    """
    bare: Any = getattr(model, "module", model)
    head, wanted, found = lm_head(bare), targets != IGNORED, []

    def score(hidden: torch.Tensor) -> torch.Tensor:
        options: Any = {"with_entropy": with_entropy, "with_metrics": with_metrics}
        # index_select adds the gradients of one position's targets in order, so that every run gets the same bits.
        states = hidden[wanted] if positions is None else hidden.flatten(0, -2).index_select(0, positions)
        found.append(score_tokens(states, head.weight, targets[wanted], temperature, **options))
        return found[-1].logprobs

    with _forward_replaced(head, score):
        logprobs = model(**inputs).logits
    (scores,) = found
    return replace(scores, logprobs=logprobs)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Calling the module, with all its hooks, runs `forward` inside this context."""
    instance = vars(module)
    own = instance.get("forward")  # most have none: theirs is the class's
    instance["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del instance["forward"]
        else:
            instance["forward"] = own


def model_token_scores(
    model: nn.Module, inputs: dict[str, Any], positions: torch.Tensor, targets: torch.Tensor
) -> TokenScores:
    """One forward without gradients, and scores of single tokens at single positions; several at one of them too.

    Args:
        inputs: keyword arguments of the model's forward, without labels; `input_ids` [1, N].
        positions: [M] places in 0 to N - 1. targets: [M] ids whose probability to come behind them is asked for.

    Returns:
        scores [M] with `is_top1`.
    """
    bare: Any = getattr(model, "module", model)
    head, found = lm_head(bare), []

    def score(hidden: torch.Tensor) -> torch.Tensor:
        found.append(score_tokens(hidden[0, positions], head.weight, targets, with_metrics=True))
        return found[-1].logprobs

    with torch.no_grad(), _forward_replaced(head, score):
        model(**inputs)
    return found[0]
