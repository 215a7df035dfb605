"""Advantages against closed forms worked out by hand."""

from __future__ import annotations

import inspect
from typing import get_args

import numpy as np
import pytest
import torch

from dots_align.config import AdvantageEstimator, AlgorithmSection
from dots_align.objectives.advantages import (
    GROUP_RELATIVE,
    compute_advantages,
    overlong_penalty,
    zero_variance_groups,
)

# Two prompts, interleaved; the second one's answers all fail.
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
GROUPS = [7, 3, 7, 3, 7, 3]
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).float()


def advantages(estimator: str, rewards: torch.Tensor = REWARDS, **keys: object) -> torch.Tensor:
    extra = {"baselines": torch.full((6,), 0.25)} if estimator == "remax" else {}
    extra |= {"values": torch.zeros(6, 3)} if estimator == "gae" else {}
    found, _ = compute_advantages(
        rewards, MASK, GROUPS, AlgorithmSection(advantage_estimator=estimator, **keys), **extra
    )
    return found


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


def test_reinforce_plus_plus_baseline_whitens_what_is_left_of_the_groups_mean() -> None:
    centred = torch.tensor([2 / 3, 0, -1 / 3, 0, -1 / 3, 0])[:, None] * MASK
    values = centred[MASK.bool()]
    wanted = (centred - values.mean()) / values.std() * MASK
    torch.testing.assert_close(advantages("reinforce_plus_plus_baseline"), wanted, atol=1e-4, rtol=0)


def test_remax_subtracts_the_reward_of_the_greedy_answer() -> None:
    per_response = REWARDS - 0.25
    torch.testing.assert_close(advantages("remax"), per_response[:, None] * MASK)


def test_gpg_subtracts_the_mean_and_makes_up_for_rewards_of_nothing() -> None:
    # One of six rewards is not 0: everything counts six times.
    per_response = 6 * torch.tensor([2 / 3, 0, -1 / 3, 0, -1 / 3, 0])
    torch.testing.assert_close(advantages("gpg"), per_response[:, None] * MASK)


def test_gae_by_hand() -> None:
    """delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}; then whitened over all tokens."""
    values = torch.tensor([[0.5, 0.1, 0.2], [0.4, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    algorithm = AlgorithmSection(name="ppo", gamma=0.9, lam=0.5)
    found, returns = compute_advantages(torch.tensor([1.0, 0.0]), mask, [0, 1], algorithm, values=values)
    last = 1.0 - 0.2
    middle = (0.9 * 0.2 - 0.1) + 0.45 * last
    first = (0.9 * 0.1 - 0.5) + 0.45 * middle
    raw = torch.tensor([[first, middle, last], [-0.4, 0, 0]])
    torch.testing.assert_close(returns, (raw + values) * mask)
    tokens = raw[mask.bool()]
    torch.testing.assert_close(found, (raw - tokens.mean()) / tokens.std() * mask, atol=1e-4, rtol=0)


def test_penalties_come_off_each_tokens_reward() -> None:
    """ReMax's advantage of a token is what comes from there on, less the baseline."""
    penalties = torch.full_like(MASK, 0.1)
    algorithm = AlgorithmSection(name="remax", kl_coef=0.1)
    found, _ = compute_advantages(
        REWARDS, MASK, GROUPS, algorithm, penalties=penalties, baselines=torch.full((6,), 0.25)
    )
    torch.testing.assert_close(found[0], torch.tensor([0.45, 0.55, 0.65]))
    torch.testing.assert_close(found[5], torch.tensor([-0.45, -0.35, 0.0]))


def test_overlong_responses_lose_reward_linearly() -> None:
    algorithm = AlgorithmSection(name="dapo", overlong_penalty=0.5)  # the last fifth of 100 tokens
    found = [overlong_penalty(n, 100, algorithm) for n in (1, 80, 85, 90, 100)]
    assert found == pytest.approx([0, 0, -0.125, -0.25, -0.5])
    assert overlong_penalty(100, 100, AlgorithmSection()) == 0


@pytest.mark.parametrize("estimator", get_args(AdvantageEstimator))
def test_every_estimator_equals_verls(estimator: str) -> None:
    """Called directly, with what its signature asks for."""
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos

    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.rand(6, generator=generator), torch.rand(6, 3, generator=generator)
    baselines, penalties = torch.rand(6, generator=generator), torch.rand(6, 3, generator=generator) * MASK
    token_rewards = -penalties
    for row, length in enumerate(MASK.sum(-1).int()):
        token_rewards[row, length - 1] += rewards[row]
    offered = {
        "token_level_rewards": token_rewards,
        "response_mask": MASK,
        "index": np.array(GROUPS),
        "config": AlgoConfig(gamma=0.9, lam=0.8),
        "values": values,
        "reward_baselines": baselines,
        "gamma": 0.9,
        "lam": 0.8,
    }
    theirs = core_algos.get_adv_estimator_fn(estimator)
    wanted, returns = theirs(**{k: v for k, v in offered.items() if k in inspect.signature(theirs).parameters})
    discounts = {"gae": {"gamma": 0.9, "lam": 0.8}, "reinforce_plus_plus": {"gamma": 0.9}}.get(estimator, {})
    algorithm = AlgorithmSection(advantage_estimator=estimator, **discounts)
    found = compute_advantages(
        rewards, MASK, GROUPS, algorithm, penalties=penalties, baselines=baselines, values=values
    )
    assert torch.equal(found[0], wanted * MASK)
    assert torch.equal(found[1], returns * MASK)


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


def test_a_reward_goes_to_the_last_token_that_was_sampled() -> None:
    """Between turns there are tokens of an environment: an advantage passes over them, and they have none."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1.0]])
    algorithm = AlgorithmSection(name="ppo", lam=0.5)
    values = torch.tensor([[0.1, 0.2, 9.0, 9.0, 0.3, 9.0], [0.1, 9.0, 9.0, 0.2, 0.3, 0.4]])
    advantages, returns = compute_advantages(torch.tensor([1.0, 0.0]), mask, [0, 1], algorithm, values=values)
    assert (advantages[mask == 0] == 0).all()
    for row in (0, 1):  # as if what the policy sampled stood alone
        own = mask[row].bool()
        alone = compute_advantages(
            torch.tensor([1.0, 0.0])[row : row + 1],
            torch.ones(1, int(own.sum())),
            [0],
            algorithm,
            values=values[row : row + 1, own],
        )[1]
        torch.testing.assert_close(returns[row, own], alone[0])
