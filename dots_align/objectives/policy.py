"""The policy objective: verl's registered losses, by name, plus the KL term."""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

from dots_align.config import AlgorithmSection

_KL_NAMES = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}  # verl's names for Schulman's estimators


class PolicyObjective:
    """Loss of a micro-batch as its share of the batch: the sum over micro-batches is the batch's, however it is cut.

    Args:
        algorithm: names the loss, the clip range, the aggregation and the KL term.
        batch_num_tokens, global_batch_size: response tokens and sequences of the whole optimizer batch, the
        denominators.
        max_tokens: longest response there can be, the constant of `seq-mean-token-sum-norm` (Dr. GRPO).
    """

    def __init__(
        self, algorithm: AlgorithmSection, batch_num_tokens: int, global_batch_size: int, max_tokens: int
    ) -> None:
        self.algorithm = algorithm
        self._loss: Any = core_algos.get_policy_loss_fn(algorithm.policy_loss)
        self._config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio=algorithm.clip_ratio_low,
            clip_ratio_low=algorithm.clip_ratio_low,
            clip_ratio_high=algorithm.clip_ratio_high,
            policy_loss=PolicyLossConfig(loss_mode=algorithm.policy_loss),
        )
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
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """All tensors [B, T]. Returns the scalar loss and verl's metrics of it, plus `kl` where there is a
        reference.
        """
        mode = self.algorithm.loss_agg_mode
        loss, metrics = self._loss(old_logprobs, logprobs, advantages, response_mask, mode, self._config)
        found = {name.removeprefix("actor/"): float(value) for name, value in metrics.items()}
        if ref_logprobs is not None:
            estimate: Any = core_algos.kl_penalty  # annotated for FloatTensor, a type no CPU tensor has
            divergence = estimate(logprobs, ref_logprobs, _KL_NAMES[self.algorithm.kl_estimator])
            penalty = core_algos.agg_loss(divergence, response_mask, mode, **self._denominators)
            loss = loss + self.algorithm.kl_coef * penalty
            found["kl"] = float((divergence.detach() * response_mask).sum() / response_mask.sum().clamp(min=1))
        return loss, found
