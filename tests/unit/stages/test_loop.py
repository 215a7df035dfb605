"""The order of prompts, what a rollout keeps, and the minibatches of the RL loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dots_align.data.chat import stop_token_ids
from dots_align.objectives.advantages import zero_variance_groups
from dots_align.objectives.mismatch import MismatchError
from dots_align.runtime import MetricsLog
from dots_align.stages.rollouts import PromptSampler
from dots_align.stages.update import split_groups
from dots_align.types import GenerationRequest, SamplingParams


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_every_epoch_sees_each_prompt_once(num_prompts: int, per_step: int, seed: int) -> None:
    sampler = PromptSampler(num_prompts, seed)
    drawn = [pair for step in range(2 * num_prompts) for pair in sampler.draw(step * per_step, per_step)]
    assert [position for position, _ in drawn] == list(range(len(drawn)))
    for start in range(0, len(drawn) - num_prompts + 1, num_prompts):
        assert sorted(index for _, index in drawn[start : start + num_prompts]) == list(range(num_prompts))


def test_the_order_depends_on_seed_and_position_alone() -> None:
    sampler = PromptSampler(50, 3)
    wanted = [sampler.draw(7 * step, 7) for step in range(20)]
    assert [PromptSampler(50, 3).draw(7 * step, 7) for step in reversed(range(20))] == wanted[::-1]
    assert PromptSampler(50, 4).draw(0, 7) != wanted[0]
    epochs = [[index for step in wanted for _, index in step][start : start + 50] for start in (0, 50)]
    assert epochs[0] != epochs[1]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 8))
def test_minibatches_hold_whole_groups_in_even_numbers(num_groups: int, group_size: int, count: int) -> None:
    groups = [g for g in range(num_groups) for _ in range(group_size)]
    batches = split_groups(groups, count)
    assert [i for batch in batches for i in batch] == list(range(len(groups)))
    assert len(batches) == min(count, num_groups)
    sizes = [len({groups[i] for i in batch}) for batch in batches]
    assert sum(sizes) == num_groups  # no group is torn apart
    assert max(sizes) - min(sizes) <= 1


def test_dynamic_sampling_replaces_groups_without_variance(loop) -> None:
    refilling = loop("noisy", {"name": "dapo", "overlong_buffer": 0.0, "max_refill_rounds": 20})
    rollouts = refilling.rollout()
    groups = {t.group for t in rollouts.trajectories}
    assert len(groups) == 4
    rewards = torch.tensor([t.reward for t in rollouts.trajectories])
    assert not zero_variance_groups(rewards, [t.group for t in rollouts.trajectories])
    assert rollouts.metrics["refill_rounds"] > 0
    assert rollouts.metrics["dropped_groups"] == refilling.collector.position - 4 > 0
    # The reward that is logged is that of all that was sampled.
    assert rollouts.metrics["reward"] < 0.5
    plain = loop("noisy", {"name": "grpo"})
    assert len({t.group for t in plain.rollout().trajectories}) == plain.collector.position == 4


def test_dynamic_sampling_gives_up_after_its_rounds(loop) -> None:
    refilling = loop("never", {"name": "dapo", "max_refill_rounds": 2})
    rollouts = refilling.rollout()
    assert refilling.collector.position == 12
    assert rollouts.metrics["refill_rounds"] == 2
    assert rollouts.metrics["dropped_groups"] == 0
    assert len({t.group for t in rollouts.trajectories}) == 12


def test_overlong_responses_are_taught_less_than_they_are_logged(loop) -> None:
    rollouts = loop("never", {"name": "grpo", "overlong_buffer": 0.5}).rollout()
    for trajectory in rollouts.trajectories:
        assert trajectory.reward == pytest.approx(-max(len(trajectory.response_ids) - 3, 0) / 3)
    taught = [t.reward for t in rollouts.trajectories]
    assert rollouts.metrics["reward"] == 0
    assert rollouts.metrics["overlong_penalty"] == pytest.approx(-sum(taught) / len(taught))


def test_remax_compares_with_the_greedy_answer(loop) -> None:
    greedy_loop = loop("length", {"name": "remax"}, group_size=1)
    rollouts = greedy_loop.rollout()
    assert len(rollouts.trajectories) == 4
    sampling = SamplingParams(0.0, max_tokens=6, stop_token_ids=stop_token_ids(greedy_loop.tokenizer))
    requests = [GenerationRequest(t.prompt_ids, 1, sampling) for t in rollouts.trajectories]
    answers = greedy_loop.rollout_engine.generate(requests)
    assert rollouts.baselines == [len(answer.response_ids) for (answer,) in answers]
    assert rollouts.metrics["greedy_reward"] == sum(rollouts.baselines) / 4


def test_a_run_that_is_stopped_says_what_stopped_it(loop, tmp_path: Path) -> None:
    stopped = loop("length", {"name": "grpo"}, mismatch={"stop_above": 1e-12, "measure": "max"})
    with pytest.raises(MismatchError):
        stopped.train_step(MetricsLog(tmp_path))
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 1
    assert line["grpo/mismatch_max"] > 1e-12
    assert "grpo/reward" in line
