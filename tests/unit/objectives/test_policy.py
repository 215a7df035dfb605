"""The policy objective against the formulas, and its promise that cutting a batch changes nothing."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from dots_align.config import PRESETS, AlgorithmSection, LossAggregation, PolicyLoss, RolloutCorrectionSection
from dots_align.objectives.policy import WHOLE_BATCH, PolicyObjective, actor_config, correct_rollout, kl_controller

LENGTHS = torch.tensor([5, 2, 7, 1, 4, 3])
MASK = (torch.arange(7)[None] < LENGTHS[:, None]).float()
TOKENS, SIZE = int(MASK.sum()), len(MASK)


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs now, before, of the reference; advantages. Ratios lie well inside and outside the clip range."""
    generator = torch.Generator().manual_seed(seed)
    now, old, ref = (-2 * torch.rand(MASK.shape, generator=generator) * MASK for _ in range(3))
    advantages = torch.tensor([3.0, -3.0, 1.5, -1.5, 6.0, 0.0])[:, None] * MASK
    return now.requires_grad_(), old, ref, advantages


# The recipe's keys that go with each loss, all else as in GRPO but for the mean over tokens.
LOSSES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gspo": {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    "sapo": {"loss_agg_mode": "seq-mean-token-mean"},
    "cispo": {"clip_ratio_low": 10.0},
    "gpg": {},
    "geo_mean": {"loss_agg_mode": "seq-mean-token-mean", "clip_ratio_low": 0.4, "clip_ratio_high": 0.4},
    "clip_cov": {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1},
    "kl_cov": {"kl_cov_ratio": 0.1},
}


def objective(**keys: Any) -> PolicyObjective:
    filled = {"loss_agg_mode": "token-mean", **LOSSES[keys.get("policy_loss", "vanilla")], **keys}
    return PolicyObjective(AlgorithmSection(**filled), TOKENS, SIZE, MASK.shape[1])


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
    (loss, LOSSES[loss].get("loss_agg_mode", "token-mean"))
    for loss in get_args(PolicyLoss)
    if loss != "vanilla" and loss not in WHOLE_BATCH
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


@pytest.mark.parametrize("loss", WHOLE_BATCH)
def test_losses_with_statistics_are_linearised_over_the_whole_batch(loss: str) -> None:
    """Log-probabilities times the gradients, cut as one likes, have the gradient of the loss over all."""
    now, old, ref, advantages = tensors()
    torch.manual_seed(5)
    whole, metrics = objective(policy_loss=loss, kl_coef=0.1)(now, old, advantages, MASK, ref)
    (wanted,) = torch.autograd.grad(whole, now)
    state = torch.get_rng_state()
    found = objective(policy_loss=loss, kl_coef=0.1).token_gradients(now, old, advantages, MASK, ref, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.gradients, wanted)
    assert found.loss == float(whole.detach())
    assert found.metrics == metrics


def test_kl_cov_holds_back_the_tokens_of_largest_covariance() -> None:
    now, old, _, advantages = tensors()
    plain, _ = objective(policy_loss="kl_cov", ppo_kl_coef=0.0)(now, old, advantages, MASK)
    held, _ = objective(policy_loss="kl_cov")(now, old, advantages, MASK)
    valid = MASK.bool()
    covariance = (advantages[valid] - advantages[valid].mean()) * (now[valid] - now[valid].mean())
    largest = covariance.topk(int(0.1 * TOKENS)).indices
    torch.testing.assert_close(held - plain, (now - old).abs()[valid][largest].sum() / TOKENS)


def test_clip_cov_leaves_out_tokens_between_its_bounds() -> None:
    now, old, _, advantages = tensors()
    torch.manual_seed(0)
    loss, metrics = objective(policy_loss="clip_cov", clip_ratio_low=0.9, clip_ratio_high=9.0)(
        now, old, advantages, MASK
    )
    (gradient,) = torch.autograd.grad(loss, now)
    taught = (advantages != 0) & MASK.bool()
    left_out = taught & (gradient == 0)
    assert left_out.sum() == int(0.1 * TOKENS) == round(metrics["pg_clipfrac"] * TOKENS)
    mean_advantage, mean_logprob = ((x * MASK).sum() / TOKENS for x in (advantages, now))
    covariance = ((advantages - mean_advantage) * (now - mean_logprob))[left_out]
    assert ((covariance > 0.1) & (covariance < 5)).all()


def test_geo_mean_is_the_clipped_geometric_mean_of_ratios() -> None:
    now, old, _, advantages = tensors()
    loss, _ = objective(policy_loss="geo_mean")(now, old, advantages, MASK)
    log_ratio, sign = now - old, advantages.sign()
    held = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-0.4, 0.4))
    per_response = ((held * MASK).sum(-1) / LENGTHS).exp() * advantages[:, 0]
    torch.testing.assert_close(loss, -per_response.mean())


def test_gspo_weighs_a_response_by_its_mean_ratio() -> None:
    now, _, _, advantages = tensors()
    old = now.detach() + torch.tensor([2e-4, 5e-4, -2e-4, -5e-4, -6e-4, 0])[:, None] * MASK
    loss, metrics = objective(policy_loss="gspo", loss_agg_mode="seq-mean-token-mean")(now, old, advantages, MASK)
    ratio = (now - old).sum(-1).div(LENGTHS).exp()
    gain = torch.minimum(ratio * advantages[:, 0], ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages[:, 0])
    torch.testing.assert_close(loss, -gain.mean())
    clipped = (
        LENGTHS[[1, 4]].sum() / TOKENS
    )  # a worse answer that got rarer by 5e-4, a better one more frequent by 6e-4
    assert metrics["pg_clipfrac"] == pytest.approx(float(clipped))


def test_cispo_weighs_log_probabilities_by_the_capped_ratio() -> None:
    now, old, _, advantages = tensors()
    (gradient,) = torch.autograd.grad(objective(policy_loss="cispo")(now, old, advantages, MASK)[0], now)
    weight = (now - old).detach().exp().clamp(max=1.2)
    torch.testing.assert_close(gradient, -weight * advantages * MASK / TOKENS)


def test_sapo_gates_softly() -> None:
    now, old, _, advantages = tensors()
    loss, _ = objective(policy_loss="sapo")(now, old, advantages, MASK)
    steepness = torch.where(advantages > 0, 1.0, 1.05)
    gate = torch.sigmoid(steepness * ((now - old).exp() - 1)) * 4 / steepness
    torch.testing.assert_close(loss, -((gate * advantages * MASK).sum(-1) / LENGTHS).mean())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_equals_verls_loss(name: str) -> None:
    """verl's registered function, called directly with the preset's numbers, gives the same loss and gradient."""
    from verl.trainer.ppo import core_algos

    algorithm = AlgorithmSection(name=name)
    now, old, _, advantages = tensors()
    torch.manual_seed(0)
    loss, _ = PolicyObjective(algorithm, TOKENS, SIZE, MASK.shape[1])(now, old, advantages, MASK)
    (gradient,) = torch.autograd.grad(loss, now)
    config = actor_config(algorithm)
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=TOKENS, global_batch_size=SIZE, loss_scale_factor=MASK.shape[1]
    )
    torch.manual_seed(0)
    theirs, _ = core_algos.get_policy_loss_fn(algorithm.policy_loss)(
        old, now, advantages, MASK, algorithm.loss_agg_mode, config
    )
    assert torch.equal(loss, theirs)
    assert torch.equal(gradient, torch.autograd.grad(theirs, now)[0])


CORRECTION = RolloutCorrectionSection(
    rollout_is="token", rollout_is_threshold=1.5, rollout_rs=("seq_max_k2",), rollout_rs_threshold=(0.4,)
)


def test_correction_weighs_tokens_and_rejects_responses() -> None:
    now, old, sampled, advantages = tensors()
    weights, kept, metrics = correct_rollout(old, sampled, MASK, CORRECTION)
    assert weights is not None
    torch.testing.assert_close(weights, (old - sampled).exp().clamp(max=1.5) * MASK)
    far = (0.5 * (old - sampled) ** 2 * MASK).amax(-1) > 0.4
    assert far.any()
    assert not far.all()
    assert torch.equal(kept, MASK * ~far[:, None])
    assert metrics["rejected_tokens"] == pytest.approx(1 - float(kept.sum()) / TOKENS)
    algorithm = AlgorithmSection(loss_agg_mode="token-mean")
    corrected = PolicyObjective(algorithm, TOKENS, SIZE, MASK.shape[1], correction=CORRECTION)
    loss, _ = corrected(now, now.detach(), advantages, MASK, None, now.detach() + sampled - old)
    # On policy and with that difference, a kept token's gradient is its advantage times its weight.
    torch.testing.assert_close(
        torch.autograd.grad(loss, now)[0], -advantages * weights * kept / TOKENS, atol=1e-6, rtol=1e-4
    )


def test_correction_does_not_depend_on_how_the_batch_is_cut() -> None:
    now, old, sampled, advantages = tensors()
    algorithm = AlgorithmSection()

    def loss(rows: list[int]) -> torch.Tensor:
        cut = PolicyObjective(algorithm, TOKENS, SIZE, MASK.shape[1], correction=CORRECTION)
        width = int(LENGTHS[rows].max())
        tensors = [x[rows, :width] for x in (now, old, advantages, MASK, sampled)]
        return cut(*tensors[:4], None, tensors[4])[0]

    parts = torch.stack([loss(rows) for rows in ([2], [0, 4], [5, 1, 3])])
    torch.testing.assert_close(parts.sum(), loss(list(range(SIZE))))


def test_icepop_drops_what_lies_outside() -> None:
    _, old, sampled, _ = tensors()
    weights, kept, _ = correct_rollout(
        old, sampled, MASK, RolloutCorrectionSection(rollout_is="token", rollout_is_threshold="0.5_2.0")
    )
    ratio = (old - sampled).exp()
    assert weights is not None
    torch.testing.assert_close(weights, torch.where((ratio < 0.5) | (ratio > 2), 0.0, ratio) * MASK)
    assert torch.equal(kept, MASK)


def test_the_adaptive_coefficient_moves_towards_the_target() -> None:
    adaptive = AlgorithmSection(kl_coef=0.1, kl_controller="adaptive", kl_target=0.05, kl_horizon=1000)
    controller = kl_controller(adaptive)
    controller.update(0.052, 100)  # 4 % too much, a tenth of the horizon
    assert controller.value == pytest.approx(0.1 * 1.004)
    controller.update(0.0, 100)  # errors count as 20 % at most
    assert controller.value == pytest.approx(0.1 * 1.004 * 0.98)
    fixed = kl_controller(AlgorithmSection(kl_coef=0.1))
    fixed.update(5.0, 100)
    assert fixed.value == 0.1


@pytest.mark.parametrize("loss", get_args(PolicyLoss))
def test_every_loss_prefers_what_was_better(loss: str) -> None:
    """At the policy that sampled, its gradient raises tokens of positive and lowers those of negative advantage."""
    now, _, _, advantages = tensors()
    keys = {"ppo_kl_coef": 0.0} if loss == "kl_cov" else {}
    value, metrics = objective(policy_loss=loss, **keys)(now, now.detach().clone(), advantages, MASK)
    (gradient,) = torch.autograd.grad(value, now)
    assert all(torch.isfinite(torch.tensor(list(metrics.values())))) if metrics else loss == "gpg"
    assert (gradient[advantages > 0] <= 0).all()
    assert (gradient[advantages < 0] >= 0).all()
    assert (gradient != 0).sum() > TOKENS / 2
    assert (gradient[MASK == 0] == 0).all()
