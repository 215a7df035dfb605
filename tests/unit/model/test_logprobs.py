"""Chunked log-probabilities against the plain formula."""

from __future__ import annotations

import pytest
import torch

from dots_align.model.logprobs import token_logprobs


def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 12, generator=generator, requires_grad=True)
    head = torch.randn(41, 12, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(0, 41, (23,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 1000])
def test_equals_log_softmax_forward_and_backward(chunk_tokens: int) -> None:
    hidden, head, targets = make()
    weights = torch.linspace(-1, 1, 23)
    reference = (hidden @ head.T).log_softmax(-1)
    wanted = reference.gather(-1, targets[:, None]).squeeze(-1)
    grads = torch.autograd.grad((wanted * weights).sum(), (hidden, head))
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk_tokens)
    torch.testing.assert_close(logprobs, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, -(reference.exp() * reference).sum(-1).detach(), atol=1e-5, rtol=0)
    assert not entropy.requires_grad
    found = torch.autograd.grad((logprobs * weights).sum(), (hidden, head))
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_without_gradients_the_values_are_the_same() -> None:
    hidden, head, targets = make()
    wanted = token_logprobs(hidden, head, targets, 4)
    with torch.no_grad():
        found = token_logprobs(hidden, head, targets, 4)
    assert not found[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_bfloat16_weights_give_fp32_logprobs() -> None:
    hidden, head, targets = make()
    logprobs, entropy = token_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(hidden, head, targets)[0], atol=0.2, rtol=0)
