"""Log-probabilities of given tokens, in chunks: the [tokens, vocabulary] matrix never exists as a whole."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 2048


def _chunk(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ head.T).float()
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return picked, entropy


def token_logprobs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under the language-model head, and the entropy there.

    Args:
        hidden: [N, hidden] final hidden states, one before each target.
        head: [V, hidden] weight of the language-model head.
        targets: [N] token ids.
        chunk_tokens: rows whose logits exist at one time; backward computes them again.

    Returns:
        logprobs [N] fp32 (differentiable), entropy [N] fp32 in nats (not differentiable).
    """
    pieces = [
        checkpoint(_chunk, h, head, t, use_reentrant=False) if torch.is_grad_enabled() else _chunk(h, head, t)
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
