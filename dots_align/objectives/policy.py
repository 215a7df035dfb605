"""The policy objective: verl's registered losses, by name, plus the KL term and the correction for rollouts that were
sampled under other probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig, PolicyLossConfig

from dots_align.config import AlgorithmSection, RolloutCorrectionSection

_KL_NAMES = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}  # verl's names for Schulman's estimators
WHOLE_BATCH = ("clip_cov", "kl_cov")
"""Losses that pick tokens by a statistic of all they are given: they have to be given the whole optimizer batch."""


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy, reference), in nats, by Schulman's k1, k2 or k3."""
    estimate: Any = core_algos.kl_penalty  # annotated for FloatTensor, a type no CPU tensor has
    return estimate(logprobs, ref_logprobs, _KL_NAMES[estimator])


def kl_controller(algorithm: AlgorithmSection) -> core_algos.FixedKLController | core_algos.AdaptiveKLController:
    """verl's: `value` is the coefficient, `update(current_kl, num_responses)` moves it if it is adaptive."""
    if algorithm.kl_controller == "fixed":
        return core_algos.FixedKLController(algorithm.kl_coef)
    return core_algos.AdaptiveKLController(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)


def correct_rollout(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    correction: RolloutCorrectionSection,
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, float]]:
    """verl's rollout correction.

    Args:
        logprobs: [B, T] of the trainer before the update. rollout_logprobs: [B, T] that were sampled under.

    Returns:
        weights [B, T] or None, the mask [B, T] without what is rejected, metrics that are means over tokens.
    """
    found, kept, _ = compute_rollout_correction_and_rejection_mask(
        logprobs.detach(),
        rollout_logprobs,
        mask,
        rollout_is=correction.rollout_is,
        rollout_is_threshold=correction.rollout_is_threshold,
        rollout_rs=",".join(correction.rollout_rs) or None,
        rollout_rs_threshold=",".join(map(str, correction.rollout_rs_threshold)) or None,
    )
    tokens = mask.sum()
    metrics = {"rejected_tokens": float(1 - kept.sum() / tokens)}
    weights = None if found is None else found.batch["rollout_is_weights"]
    if weights is not None:
        metrics["rollout_weight"] = float((weights * mask).sum() / tokens)
    return weights, kept, metrics


@dataclass(frozen=True)
class TokenGradients:
    """A whole batch's loss, its metrics, and its gradient [B, T] in each log-probability."""

    loss: float
    metrics: dict[str, float]
    gradients: torch.Tensor


class PolicyObjective:
    """Loss of a micro-batch as its share of the batch: the sum over micro-batches is the batch's, however it is cut.

    Args:
        algorithm: names the loss, the clip range, the aggregation and the KL term.
        batch_num_tokens, global_batch_size: response tokens and sequences of the whole optimizer batch, the
        denominators.
        max_tokens: longest response there can be, the constant of `seq-mean-token-sum-norm` (Dr. GRPO).
        kl_coef: where a controller has moved it.
        correction: for differences between rollout and trainer.
    """

    def __init__(
        self,
        algorithm: AlgorithmSection,
        batch_num_tokens: int,
        global_batch_size: int,
        max_tokens: int,
        kl_coef: float | None = None,
        correction: RolloutCorrectionSection | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.kl_coef = algorithm.kl_coef if kl_coef is None else kl_coef
        self.correction = correction if correction is not None and correction.active else None
        self._loss: Any = core_algos.get_policy_loss_fn(algorithm.policy_loss)
        self._config = actor_config(algorithm)
        self._denominators = {
            "dp_size": 1,
            "batch_num_tokens": batch_num_tokens,
            "global_batch_size": global_batch_size,
            "loss_scale_factor": max_tokens,
        }
        self._config.global_batch_info.update(self._denominators)

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        ref_logprobs: torch.Tensor | None = None,
        rollout_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """All tensors [B, T]. Returns the scalar loss and verl's metrics of it, plus `kl` where there is a
        reference.
        """
        mode, mask, weights, corrected = self.algorithm.loss_agg_mode, response_mask, None, {}
        if self.correction is not None:
            assert rollout_logprobs is not None
            weights, mask, corrected = correct_rollout(old_logprobs, rollout_logprobs, mask, self.correction)
        loss, metrics = self._loss(old_logprobs, logprobs, advantages, mask, mode, self._config, weights)
        if self.algorithm.policy_loss == "geo_mean":  # verl's is the mean over what it is given
            loss = loss * len(logprobs) / self._denominators["global_batch_size"]
        found = {name.removeprefix("actor/"): float(value) for name, value in metrics.items()} | corrected
        if ref_logprobs is not None:
            divergence = kl_estimate(logprobs, ref_logprobs, self.algorithm.kl_estimator)
            penalty = core_algos.agg_loss(divergence, mask, mode, **self._denominators)
            loss = loss + self.kl_coef * penalty
            found["kl"] = float((divergence.detach() * response_mask).sum() / response_mask.sum().clamp(min=1))
        return loss, found

    def token_gradients(self, logprobs: torch.Tensor, *others: torch.Tensor | None, seed: int) -> TokenGradients:
        """The loss of a whole batch as a linear function of its log-probabilities, for losses in WHOLE_BATCH.

        Multiplied by these gradients and added up, the log-probabilities of micro-batches have the whole batch's
        gradient, however it is cut.

        Args:
            logprobs, others: as in a call, of the whole batch. seed: of the tokens that clip_cov picks.
        """
        leaf = logprobs.detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            loss, metrics = self(leaf, *others)  # pyright: ignore[reportArgumentType]
            (gradients,) = torch.autograd.grad(loss, leaf)
        return TokenGradients(float(loss.detach()), metrics, gradients)


def actor_config(algorithm: AlgorithmSection) -> ActorConfig:
    """The keys that verl's losses read, under verl's names."""
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=algorithm.clip_ratio_low,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        clip_ratio_c=algorithm.clip_ratio_c,
        tau_pos=algorithm.tau_pos,
        tau_neg=algorithm.tau_neg,
        policy_loss=PolicyLossConfig(
            loss_mode=algorithm.policy_loss,
            clip_cov_ratio=algorithm.clip_cov_ratio,
            clip_cov_lb=algorithm.clip_cov_lb,
            clip_cov_ub=algorithm.clip_cov_ub,
            kl_cov_ratio=algorithm.kl_cov_ratio,
            ppo_kl_coef=algorithm.ppo_kl_coef,
        ),
    )
