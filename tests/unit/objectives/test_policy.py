"""The policy objective against the formulas, and its promise that cutting a batch changes nothing."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from dots_align.config import AlgorithmSection, LossAggregation, PolicyLoss
from dots_align.objectives.policy import PolicyObjective

LENGTHS = torch.tensor([5, 2, 7, 1, 4, 3])
MASK = (torch.arange(7)[None] < LENGTHS[:, None]).float()
TOKENS, SIZE = int(MASK.sum()), len(MASK)


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs now, before, of the reference; advantages. Ratios lie well inside and outside the clip range."""
    generator = torch.Generator().manual_seed(seed)
    now, old, ref = (-2 * torch.rand(MASK.shape, generator=generator) * MASK for _ in range(3))
    advantages = torch.tensor([3.0, -3.0, 1.5, -1.5, 6.0, 0.0])[:, None] * MASK
    return now.requires_grad_(), old, ref, advantages


def objective(**keys: Any) -> PolicyObjective:
    return PolicyObjective(AlgorithmSection(**keys), TOKENS, SIZE, MASK.shape[1])


def test_vanilla_is_the_clipped_ratio() -> None:
    now, old, _, advantages = tensors()
    loss, metrics = objective(clip_ratio_low=0.1, clip_ratio_high=0.3)(now, old, advantages, MASK)
    ratio = (now - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.3) * advantages)
    gain = torch.where(advantages < 0, gain.maximum(3 * advantages), gain)  # dual clip (Ye et al. 2020), c = 3
    assert (ratio[MASK.bool()] > 3).any()
    torch.testing.assert_close(loss, -(gain * MASK).sum() / TOKENS)
    clipped = (ratio.clamp(0.9, 1.3) * advantages < ratio * advantages) & MASK.bool()
    assert metrics["pg_clipfrac"] == pytest.approx(float(clipped.sum()) / TOKENS)
    assert metrics["ppo_kl"] == pytest.approx(float(((old - now.detach()) * MASK).sum()) / TOKENS)
    assert "kl" not in metrics


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    now, _, _, advantages = tensors()
    loss, _ = objective()(now, now.detach(), advantages, MASK)
    (gradient,) = torch.autograd.grad(loss, now)
    torch.testing.assert_close(gradient, -advantages / TOKENS)


def test_what_is_clipped_has_no_gradient() -> None:
    now, old, _, advantages = tensors()
    (gradient,) = torch.autograd.grad(objective()(now, old, advantages, MASK)[0], now)
    ratio = (now - old).exp()
    outside = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0)) | ((ratio > 3) & (advantages < 0))
    assert outside.any()
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside & (advantages != 0)] != 0).all()


AGGREGATED = {
    "token-mean": lambda x: (x * MASK).sum() / TOKENS,
    "token-sum": lambda x: (x * MASK).sum(),
    "seq-mean-token-sum": lambda x: (x * MASK).sum() / SIZE,
    "seq-mean-token-mean": lambda x: ((x * MASK).sum(-1) / LENGTHS).mean(),
    "seq-mean-token-sum-norm": lambda x: (x * MASK).sum() / SIZE / MASK.shape[1],
}


@pytest.mark.parametrize("mode", get_args(LossAggregation))
def test_aggregation(mode: str) -> None:
    now, _, _, advantages = tensors()
    loss, _ = objective(loss_agg_mode=mode)(now, now.detach(), advantages, MASK)
    torch.testing.assert_close(loss, -AGGREGATED[mode](advantages))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("k1", lambda now, ref: now - ref),
        ("k2", lambda now, ref: (now - ref) ** 2 / 2),
        ("k3", lambda now, ref: (ref - now).exp() - (ref - now) - 1),
    ],
)
def test_kl_term(name: str, formula) -> None:
    now, old, ref, advantages = tensors()
    keys = {"kl_coef": 0.3, "kl_estimator": name, "loss_agg_mode": "token-mean"}
    plain, _ = objective(**keys)(now, old, advantages, MASK)
    loss, metrics = objective(**keys)(now, old, advantages, MASK, ref)
    mean = (formula(now, ref) * MASK).sum() / TOKENS
    torch.testing.assert_close(loss - plain, 0.3 * mean)
    assert metrics["kl"] == pytest.approx(float(mean.detach()), abs=1e-6)


COMBINATIONS = [("vanilla", mode) for mode in get_args(LossAggregation)] + [
    (loss, "token-mean") for loss in get_args(PolicyLoss) if loss != "vanilla"
]


@pytest.mark.parametrize(
    ("loss", "mode"),
    COMBINATIONS,
)
def test_micro_batches_sum_to_the_whole_batch(loss: str, mode: str) -> None:
    """Each micro-batch is padded to its own longest response, as the training engine does."""
    keys = {"policy_loss": loss, "loss_agg_mode": mode, "kl_coef": 0.1}
    now, old, ref, advantages = tensors()
    torch.manual_seed(0)
    whole, _ = objective(**keys)(now, old, advantages, MASK, ref)
    (wanted,) = torch.autograd.grad(whole, now)
    parts = []
    for members in ([2], [0, 4], [5, 1, 3]):
        width = int(LENGTHS[members].max())
        cut = [x[members, :width] for x in (now, old, advantages, MASK, ref)]
        parts.append(objective(**keys)(*cut)[0])
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, now)[0], wanted, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("loss", get_args(PolicyLoss))
def test_every_loss_prefers_what_was_better(loss: str) -> None:
    """At the policy that sampled, its gradient raises tokens of positive and lowers those of negative advantage."""
    now, _, _, advantages = tensors()
    value, metrics = objective(policy_loss=loss)(now, now.detach().clone(), advantages, MASK)
    (gradient,) = torch.autograd.grad(value, now)
    assert all(torch.isfinite(torch.tensor(list(metrics.values())))) if metrics else loss == "gpg"
    assert (gradient[advantages > 0] <= 0).all()
    assert (gradient[advantages < 0] >= 0).all()
    assert (gradient != 0).sum() > TOKENS / 2
    assert (gradient[MASK == 0] == 0).all()
