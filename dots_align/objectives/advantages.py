"""Advantages of sampled responses: verl's registered estimators, by name."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

from dots_align.config import AlgorithmSection


def compute_advantages(
    rewards: torch.Tensor, response_mask: torch.Tensor, groups: list[int], algorithm: AlgorithmSection
) -> torch.Tensor:
    """Per-token advantages [B, T].

    Args:
        rewards: [B] one scalar for each response, credited to its last token.
        response_mask: [B, T] 1 where the response has a token.
        groups: [B] which prompt each response answers.
        algorithm: names the estimator.
    """
    estimator = core_algos.get_adv_estimator_fn(algorithm.advantage_estimator)
    token_rewards = torch.zeros_like(response_mask, dtype=torch.float32)
    last = response_mask.sum(-1).long() - 1
    token_rewards[torch.arange(len(rewards), device=rewards.device), last] = rewards.float()
    config = AlgoConfig(adv_estimator=algorithm.advantage_estimator, norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std)
    offered = {
        "token_level_rewards": token_rewards,
        "response_mask": response_mask.float(),
        "index": np.array(groups),
        "config": config,
        "norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std,
        "gamma": 1.0,
    }
    wanted = inspect.signature(estimator).parameters
    advantages, _ = estimator(**{name: value for name, value in offered.items() if name in wanted})
    return advantages


# Estimators whose baseline is the group's own: equal rewards then mean zero advantages, so no gradient.
GROUP_RELATIVE = ("grpo", "rloo", "opo", "grpo_passk", "gpg")


def zero_variance_groups(rewards: torch.Tensor, groups: list[int]) -> set[int]:
    """Groups whose rewards are all exactly equal: they say nothing about which answer is better."""
    seen: dict[int, set[float]] = {}
    for reward, group in zip(rewards.tolist(), groups, strict=True):
        seen.setdefault(group, set()).add(reward)
    return {group for group, values in seen.items() if len(values) == 1}
