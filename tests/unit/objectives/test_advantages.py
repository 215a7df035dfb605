"""Advantages against closed forms worked out by hand."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from dots_align.config import AdvantageEstimator, AlgorithmSection
from dots_align.objectives.advantages import GROUP_RELATIVE, compute_advantages, zero_variance_groups

# Two prompts, interleaved; the second one's answers all fail.
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
GROUPS = [7, 3, 7, 3, 7, 3]
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).float()


def advantages(estimator: str, rewards: torch.Tensor = REWARDS, **keys: object) -> torch.Tensor:
    return compute_advantages(rewards, MASK, GROUPS, AlgorithmSection(advantage_estimator=estimator, **keys))


def test_grpo_is_the_reward_standardised_within_its_group() -> None:
    # Group 7: rewards 1, 0, 0; mean 1/3; sample standard deviation sqrt(1/3).
    deviation = (1 / 3) ** 0.5
    per_response = torch.tensor([(2 / 3) / deviation, 0, (-1 / 3) / deviation, 0, (-1 / 3) / deviation, 0])
    torch.testing.assert_close(advantages("grpo"), per_response[:, None] * MASK, atol=1e-5, rtol=0)


def test_without_std_grpo_only_subtracts_the_mean() -> None:
    per_response = torch.tensor([2 / 3, 0, -1 / 3, 0, -1 / 3, 0])
    torch.testing.assert_close(advantages("grpo", norm_adv_by_std=False), per_response[:, None] * MASK)


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    per_response = torch.tensor([1.0, 0, -1 / 2, 0, -1 / 2, 0])
    torch.testing.assert_close(advantages("rloo"), per_response[:, None] * MASK)


def test_opo_weights_its_baseline_by_length() -> None:
    # Group 7 has lengths 3, 2, 1 and rewards 1, 0, 0: baseline 3 / 6.
    per_response = torch.tensor([1 / 2, 0, -1 / 2, 0, -1 / 2, 0])
    torch.testing.assert_close(advantages("opo"), per_response[:, None] * MASK)


def test_passk_credits_only_the_best_by_its_lead() -> None:
    rewards = torch.tensor([1.0, 0.2, 0.5, 0.2, 0.0, 0.9])
    found = advantages("grpo_passk", rewards, norm_adv_by_std=False)
    per_response = torch.tensor([0.5, 0, 0, 0, 0, 0.7])
    torch.testing.assert_close(found, per_response[:, None] * MASK)


def test_reinforce_plus_plus_whitens_over_all_tokens() -> None:
    found = advantages("reinforce_plus_plus")
    returns = REWARDS[:, None] * MASK
    values = returns[MASK.bool()]
    wanted = (returns - values.mean()) / values.std() * MASK
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("estimator", get_args(AdvantageEstimator))
def test_every_estimator_gives_finite_advantages_and_none_to_padding(estimator: str) -> None:
    rewards = torch.tensor([1.0, 0.2, 0.5, 0.2, 0.0, 0.9])
    found = advantages(estimator, rewards)
    assert found.shape == MASK.shape
    assert torch.isfinite(found).all()
    assert (found[MASK == 0] == 0).all()
    assert found.abs().max() > 0
    best = found[0, 0] if estimator != "grpo_passk" else found.max()
    assert best > 0


def test_groups_whose_rewards_are_equal() -> None:
    rewards = torch.tensor([1.0, 0.3, 0.0, 0.3, 0.0, 0.3])
    assert zero_variance_groups(rewards, GROUPS) == {3}
    assert zero_variance_groups(torch.tensor([0.3, 0.3000001]), [0, 0]) == set()
    assert zero_variance_groups(torch.zeros(3), [0, 1, 2]) == {0, 1, 2}


@pytest.mark.parametrize("estimator", get_args(AdvantageEstimator))
def test_groups_without_variance_have_no_advantage(estimator: str) -> None:
    """stages.loop leaves them out of the forward and backward pass because of this."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 1.0])
    found = advantages(estimator, rewards)
    silent = [GROUPS[i] in zero_variance_groups(rewards, GROUPS) for i in range(6)]
    assert silent == [False, True] * 3
    assert (found[1::2].abs().max() == 0) == (estimator in GROUP_RELATIVE)
