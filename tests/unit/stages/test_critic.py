"""The critic: a value for each state in which a token was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dots_align.checkpoint import load_state
from dots_align.config import ModelSection, OptimSection, ParallelSection
from dots_align.model.training import CriticEngine
from dots_align.stages.critic import load_critic, save_critic
from dots_align.types import Trajectory

OPTIM = OptimSection(learning_rate=1e-3, adam_epsilon=1e-4)


@pytest.fixture
def critic(model_dir: Path) -> Any:
    return load_critic(ModelSection(path=str(model_dir)), ParallelSection(), False)


@pytest.fixture
def trajectories(token_ids) -> list[Trajectory]:
    prompts, answers = token_ids(4, 9, 4, 30), token_ids(7, 1, 12, 3, seed=1)
    return [Trajectory(p, a, [-1.0] * len(a), i, 0.0) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]


def filled(critic: Any) -> Any:
    with torch.no_grad():
        critic.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return critic


def test_a_fresh_critic_is_the_policys_backbone_and_values_nothing(
    critic: Any, loaded_model: Any, trajectories
) -> None:
    policy = dict(loaded_model.named_parameters())
    assert all(torch.equal(p, policy[n]) for n, p in critic.named_parameters() if n != "lm_head.weight")
    assert all(torch.equal(b, dict(loaded_model.named_buffers())[n]) for n, b in critic.named_buffers())
    values = CriticEngine(critic, OPTIM, 1, 100).infer_batch(trajectories, range(4))
    assert all((row == 0).all() for row in values.values())


@pytest.mark.parametrize("limit", [10_000, 20])
def test_values_are_those_of_the_states_before_each_token(critic: Any, trajectories, limit: int) -> None:
    found = CriticEngine(filled(critic), OPTIM, 1, limit).infer_batch(trajectories, range(4))
    for index, trajectory in enumerate(trajectories):
        ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
        with torch.no_grad():
            hidden = critic.model(ids, use_cache=False).last_hidden_state[0]
        wanted = hidden @ critic.lm_head.weight[0]
        first = len(trajectory.prompt_ids) - 1
        torch.testing.assert_close(found[index], wanted[first:-1], atol=1e-4, rtol=1e-4)


def test_a_saved_critic_comes_back_and_can_start_another(
    critic: Any, tokenizer: PreTrainedTokenizerFast, model_dir: Path, trajectories, tmp_path: Path
) -> None:
    engine = CriticEngine(critic, OPTIM, 4, 100)

    def step(engine: CriticEngine) -> float:
        def loss(scores):
            return ((scores.values - 1) ** 2 * scores.mask).sum() / 23, {}

        return engine.train_batch(trajectories, range(4), loss)["loss"]

    assert step(engine) == pytest.approx(1.0)
    save_critic(critic, tokenizer, tmp_path / "critic")
    engine.save_checkpoint(tmp_path / "critic", 1)
    resumed = load_critic(ModelSection(path=str(model_dir)), ParallelSection(), False)
    load_state(resumed, tmp_path / "critic")
    other = CriticEngine(resumed, OPTIM, 4, 100)
    assert other.load_checkpoint(tmp_path / "critic") == 1
    assert step(engine) == step(other) < 1.0
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), resumed.parameters(), strict=True))
    continued = load_critic(ModelSection(path=str(tmp_path / "critic")), ParallelSection(), False)
    assert continued.lm_head.weight.abs().sum() > 0
