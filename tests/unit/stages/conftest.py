"""What RL tests start from: a recipe, and responses that the tiny model itself has sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dots1ForCausalLM, PreTrainedTokenizerFast

from dots_align.config import GrpoRecipe, PpoRecipe, RewardSection
from dots_align.data.chat import encode_prompt
from dots_align.model.balance import BiasPolicy
from dots_align.model.router import LoadMonitor
from dots_align.model.training import CriticEngine, TrainingEngine
from dots_align.rollout.engine import RolloutEngine
from dots_align.scoring import RewardSum
from dots_align.stages.loop import RlLoop
from dots_align.stages.update import CriticUpdate, PolicyUpdate
from dots_align.types import GenerationRequest, Message, Prompt, SamplingParams, Trajectory

MAX_TOKENS = 12


def rl_recipe(stage: str = "grpo", **sections: Any) -> Any:
    """A recipe of the sections given; Adam's large epsilon keeps it from blowing up the rounding of vanishing
    gradients.
    """
    values = {
        "stage": stage,
        "output_dir": "unused",
        "data": {"path": "synthetic:prompts"},
        "rewards": [{"function": "a:b"}],
        "optim": {"learning_rate": 1e-3, "adam_epsilon": 1e-4},
        "rollout": {"group_size": 4, "max_tokens": MAX_TOKENS},
        **sections,
    }
    return (PpoRecipe if stage == "ppo" else GrpoRecipe).model_validate(values)


def make_update(model: Any, recipe: Any, reference: Any = None, critic: Any = None) -> PolicyUpdate:
    train = recipe.train
    updates = train.max_steps * train.num_minibatches * train.num_epochs
    engine = TrainingEngine(model, recipe.optim, updates, train.micro_batch_tokens)
    bias, learner = BiasPolicy(LoadMonitor(model), "frozen", 1e-3), None
    if critic is not None:
        critic_engine = CriticEngine(critic, recipe.critic.optim, updates, train.micro_batch_tokens)
        learner = CriticUpdate(recipe.critic, train, critic_engine)
    return PolicyUpdate(recipe, engine, reference, None, bias, learner)


@pytest.fixture(scope="session")
def sampled(loaded_model: Dots1ForCausalLM) -> list[Trajectory]:
    """4 groups of 4 with rewards of 0, 0.5 or 1, those of the last group all 1; routes as the engine recorded them."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 500, (n,), generator=generator).tolist() for n in (5, 20, 9, 3)]
    sampling = SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=tuple(range(60)), seed=1)
    groups = RolloutEngine(loaded_model).generate([GenerationRequest(p, 4, sampling) for p in prompts], True)
    rewards = [0, 1, 1, 0.5, 1, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1]
    return [
        Trajectory(prompt, s.response_ids, s.rollout_logprobs, group, rewards[4 * group + number], s.routes)
        for group, (prompt, samples) in enumerate(zip(prompts, groups, strict=True))
        for number, s in enumerate(samples)
    ]


@pytest.fixture
def shifted_routes(sampled: list[Trajectory]) -> list[Trajectory]:
    """The same with every token's experts moved on by one, which no router here would choose."""
    return [replace(t, routes=bytes((e + 1) % 16 for e in t.routes or b"")) for t in sampled]


REWARDS = '''
def noisy(response):
    """Of the first token alone, so that groups often agree."""
    return float(response.response_ids[0] % 8 == 0)


def never(response):
    return 0.0


def length(response):
    return float(len(response.response_ids))


def leaves_a_file(response, directory):
    open(f"{directory}/{response.prompt.answer}", "w").close()
    return 1.0
'''


@pytest.fixture
def loop(model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    """A loop over 64 prompts that samples 4 a step, with one of the rewards above."""
    (tmp_path / "some_rewards.py").write_text(REWARDS)

    def make(reward: str, algorithm: dict[str, Any], group_size: int = 2, **sections: Any) -> RlLoop:
        prompts = [Prompt([Message("user", f"{n}+{n}=?")], str(2 * n)) for n in range(64)]
        function = f"{tmp_path / 'some_rewards.py'}:{reward}"
        keys = {"function": function, "run_in": "trainer", **sections.pop("reward_keys", {})}
        train = {"num_prompts_per_step": 4, **sections.pop("train", {})}
        rollout = {"group_size": group_size, "max_tokens": 6, **sections.pop("rollout", {})}
        recipe = rl_recipe(algorithm=algorithm, train=train, rollout=rollout, **sections)
        prompt_ids = [encode_prompt(tokenizer, p.messages) for p in prompts]
        rewards = RewardSum([RewardSection.model_validate(keys)], 2)
        return RlLoop(recipe, model, None, tokenizer, prompts, prompt_ids, rewards)

    return make
