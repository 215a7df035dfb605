"""Advantages of sampled responses: verl's registered estimators, by name."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

from dots_align.config import AlgorithmSection


def compute_advantages(
    rewards: torch.Tensor,
    response_mask: torch.Tensor,
    groups: list[int],
    algorithm: AlgorithmSection,
    *,
    penalties: torch.Tensor | None = None,
    baselines: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token advantages and returns, each [B, T].

    Args:
        rewards: [B] one scalar for each response, credited to its last token.
        response_mask: [B, T] 1 where the response has a token that the policy sampled.
        groups: [B] which prompt each response answers.
        algorithm: names the estimator.
        penalties: [B, T] taken off each token's reward (KL in the reward).
        baselines: [B] reward of the greedy answer to each response's prompt; ReMax needs them.
        values: [B, T] a critic's; GAE needs them.
    """
    estimator = core_algos.get_adv_estimator_fn(algorithm.advantage_estimator)
    mask = response_mask.float()
    token_rewards = torch.zeros_like(mask)
    last = (mask * torch.arange(mask.shape[-1], device=mask.device)).argmax(-1)  # there may be gaps before it
    token_rewards[torch.arange(len(rewards), device=rewards.device), last] = rewards.float()
    if penalties is not None:
        token_rewards -= penalties * mask
    config = AlgoConfig(
        adv_estimator=algorithm.advantage_estimator,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
    )
    offered = {
        "token_level_rewards": token_rewards,
        "response_mask": mask,
        "index": np.array(groups),
        "config": config,
        "norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std,
        "gamma": algorithm.gamma,
        "lam": algorithm.lam,
        "reward_baselines": baselines,
        "values": values,
    }
    wanted = inspect.signature(estimator).parameters
    advantages, returns = estimator(**{name: value for name, value in offered.items() if name in wanted})
    return advantages * mask, returns * mask


# Estimators whose baseline is the group's own: equal rewards then mean zero advantages, so no gradient.
GROUP_RELATIVE = ("grpo", "rloo", "opo", "grpo_passk", "gpg")


def zero_variance_groups(rewards: torch.Tensor, groups: list[int]) -> set[int]:
    """Groups whose rewards are all exactly equal: they say nothing about which answer is better."""
    seen: dict[int, set[float]] = {}
    for reward, group in zip(rewards.tolist(), groups, strict=True):
        seen.setdefault(group, set()).add(reward)
    return {group for group, values in seen.items() if len(values) == 1}


def overlong_penalty(num_tokens: int, max_tokens: int, algorithm: AlgorithmSection) -> float:
    """DAPO's soft penalty on length: 0 up to the buffer at the end of `max_tokens`, then linear down to
    -`overlong_penalty`.
    """
    buffer = algorithm.overlong_buffer * max_tokens
    over = num_tokens - (max_tokens - buffer)
    return 0.0 if over <= 0 else -algorithm.overlong_penalty * over / buffer
