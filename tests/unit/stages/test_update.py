"""From trajectories to optimizer steps: no number depends on micro-batches, routes are replayed, mismatch stops."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Dots1ForCausalLM

from dots_align.config import PRESETS, ModelSection, ParallelSection
from dots_align.model.router import moe_layers
from dots_align.objectives.mismatch import RATIO_EDGES, Mismatch, MismatchError
from dots_align.stages.critic import load_critic
from dots_align.stages.update import balanced_ranks
from dots_align.types import Trajectory
from tests.unit.stages.conftest import make_update, rl_recipe

SEVERAL = {"num_minibatches": 2, "num_epochs": 2}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def largest_difference(one: Any, other: Any) -> float:
    a, b = weights(one), weights(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def updated(model: Any, trajectories: list[Trajectory], reference: Any = None, **sections: Any) -> tuple[Any, dict]:
    """A copy of the model after one rollout's updates, and the metrics."""
    trained = copy.deepcopy(model)
    update = make_update(trained, rl_recipe(**sections), reference)
    baselines = [0.25] * len(trajectories) if update.recipe.algorithm.advantage_estimator == "remax" else None
    return trained, update(trajectories, 0, baselines)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "ppo"])
def test_micro_batches_change_no_preset(model: Dots1ForCausalLM, sampled: list[Trajectory], name: str) -> None:
    algorithm = {"name": name, "kl_coef": 0.05}
    if name in ("clip_cov", "kl_cov"):
        algorithm |= {f"{name}_ratio": 0.05} | ({"clip_cov_lb": 0.01} if name == "clip_cov" else {})
    several = {} if name == "gpg" else SEVERAL
    runs = [
        updated(model, sampled, model, algorithm=algorithm, train={"micro_batch_tokens": limit, **several})
        for limit in (10_000, 40)
    ]
    (one, found), (other, wanted) = runs
    assert largest_difference(one, model) > 1e-4
    assert largest_difference(one, other) < 2e-6
    assert found == pytest.approx(wanted, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("replay", ["none", "R3"])
def test_the_first_minibatch_needs_no_log_probs_beforehand(
    model: Dots1ForCausalLM, sampled: list[Trajectory], replay: str
) -> None:
    """Its own first forward gives them, for its later epochs too."""
    recipe = rl_recipe(train=SEVERAL, router={"replay": replay})
    update, other = (make_update(copy.deepcopy(model), recipe) for _ in range(2))
    asked, infer_batch = [], update.engine.infer_batch

    def watched(trajectories: list[Trajectory], members: list[int], *args: Any, **keys: Any) -> Any:
        asked.extend(members)
        return infer_batch(trajectories, members, *args, **keys)

    update.engine.infer_batch = watched  # pyright: ignore[reportAttributeAccessIssue]
    update(sampled, 0)
    assert asked == list(range(8, 16))
    batch = other._prepare(sampled, 0)
    batch.old = other.engine.infer_batch(sampled, range(16), routes=batch.routes)
    other._advantages(batch, None)
    other._optimize(batch)
    assert largest_difference(update.engine.model, model) > 1e-4
    assert largest_difference(update.engine.model, other.engine.model) < 2e-6


def test_kl_in_the_reward_is_measured_and_steered(model: Dots1ForCausalLM, sampled: list[Trajectory]) -> None:
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    keys = {"name": "reinforce_plus_plus", "kl_estimator": "k3", "kl_coef": 0.2, "kl_controller": "adaptive"}
    recipe = rl_recipe(algorithm={**keys, "kl_target": 1e-4, "kl_horizon": 160})
    update = make_update(copy.deepcopy(model), recipe, reference)
    ours, theirs = (update.engine.infer_batch(sampled, range(16), m) for m in (model, reference))
    each = [float(((theirs[i] - ours[i]).exp() - 1 - (theirs[i] - ours[i])).mean()) for i in range(16)]
    metrics = update(sampled, 0)
    assert metrics["kl"] == pytest.approx(sum(each) / 16, rel=1e-3)
    assert metrics["kl"] > 1.2e-4
    assert metrics["kl_coef"] == 0.2
    # Of an error of more than 20 % counts 20 %, of 16 responses a tenth of the horizon.
    assert update.kl.value == pytest.approx(0.2 * 1.02)


# ------------------------------------------------------------------------------------------------------- several ranks


@given(
    st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=4)), max_size=12),
    st.integers(1, 5),
    st.sets(st.integers(0, 11)),
)
def test_processes_get_whole_groups_of_about_as_many_tokens(
    groups: list[tuple[int, list[int]]], num_ranks: int, silent: set[int]
) -> None:
    trajectories = [
        Trajectory([1] * prompt, [2] * answer, [-1.0] * answer, number, 0.0)
        for number, (prompt, answers) in enumerate(groups)
        for answer in answers
    ]
    ranks = balanced_ranks(trajectories, range(len(trajectories)), silent, num_ranks)
    assert sorted(ranks) == list(range(len(trajectories)))
    assert all(0 <= rank < num_ranks for rank in ranks.values())
    of_group = {t.group: {ranks[i] for i, o in enumerate(trajectories) if o.group == t.group} for t in trajectories}
    assert all(len(found) == 1 for found in of_group.values())
    tokens = {n: 0 if n in silent else prompt + sum(answers) for n, (prompt, answers) in enumerate(groups)}
    loads = [sum(tokens[n] for n, (r,) in of_group.items() if r == rank) for rank in range(num_ranks)]
    assert max(loads) - min(loads) <= max(tokens.values(), default=0)


# ------------------------------------------------------------------------------------------------------------- mismatch


def test_mismatch_by_hand() -> None:
    found = Mismatch()
    log_ratios = torch.tensor([0.0, 0.5, -0.1])
    found.add(log_ratios, torch.tensor([[True, False], [False, False]]))
    found.add(torch.tensor([0.0]), None)
    metrics = Mismatch.merged([found, Mismatch()]).metrics()
    ratios = torch.tensor([0.0, 0.5, -0.1, 0.0])
    assert metrics["mean"] == pytest.approx(0.15)
    assert metrics["max"] == pytest.approx(0.5)
    assert metrics["k1"] == pytest.approx(-0.1)
    assert metrics["kl"] == pytest.approx(float((ratios.exp() - 1 - ratios).mean()), rel=1e-5)
    assert metrics["router_shift"] == 0.25
    histogram = {name: value for name, value in metrics.items() if name.startswith("ratio_")}
    assert len(histogram) == len(RATIO_EDGES) + 1
    assert {name: value for name, value in histogram.items() if value} == {
        "ratio_0.8_0.95": 0.25,
        "ratio_0.99_1.01": 0.5,
        "ratio_1.25_2": 0.25,
    }
    assert Mismatch().metrics() == {}


def test_the_same_weights_agree(model: Dots1ForCausalLM, sampled: list[Trajectory]) -> None:
    _, metrics = updated(model, sampled)
    assert metrics["mismatch_kl"] < 1e-8
    assert metrics["mismatch_ratio_0.99_1.01"] == 1.0
    assert metrics["mismatch_router_shift"] < 0.01
    assert metrics["zero_variance_groups"] == 1.0


@pytest.mark.parametrize("train", [{}, SEVERAL])
def test_the_gate_stops_before_an_update_on_anothers_samples(
    model: Dots1ForCausalLM, sampled: list[Trajectory], train: dict[str, int]
) -> None:
    with torch.no_grad():
        for _, block in moe_layers(model):  # weights went astray between rollout and trainer
            block.gate.weight.add_(
                0.5 * torch.randn(block.gate.weight.shape, generator=torch.Generator().manual_seed(1))
            )
    trained = copy.deepcopy(model)
    with pytest.raises(MismatchError, match=r"step 1: .* mismatch.stop_above=0.0001 .*router_shift 0\.\d") as stopped:
        make_update(trained, rl_recipe(mismatch={"stop_above": 1e-4}, train=train))(sampled, 0)
    assert "No update was made" in str(stopped.value)
    assert largest_difference(trained, model) == 0
    _, metrics = updated(model, sampled, mismatch={"stop_above": None}, train=train)
    assert metrics["mismatch_kl"] > 1e-4


def test_a_log_prob_that_is_no_number_stops_the_run(model: Dots1ForCausalLM, sampled: list[Trajectory]) -> None:
    broken = replace(sampled[0], rollout_logprobs=[float("nan")] * len(sampled[0].response_ids))
    with pytest.raises(MismatchError):
        updated(model, [broken, *sampled[1:]])


def test_correction_takes_weight_from_tokens_that_differ(model: Dots1ForCausalLM, sampled: list[Trajectory]) -> None:
    far = [replace(t, rollout_logprobs=[p - 1.0 for p in t.rollout_logprobs]) for t in sampled]
    keys = {"rollout_is": "token", "rollout_is_threshold": 2.0}
    _, metrics = updated(model, far, rollout_correction=keys, mismatch={"stop_above": None})
    assert metrics["rollout_weight"] == pytest.approx(2.0, rel=1e-4)
    rejecting = {"rollout_rs": ["seq_mean_k3"], "rollout_rs_threshold": [0.1]}
    trained, metrics = updated(model, far, rollout_correction=rejecting, mismatch={"stop_above": None})
    assert metrics["rejected_tokens"] == 1.0
    assert largest_difference(trained, model) == 0


# --------------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("experts", ["dots_align_grouped", "grouped_mm", "eager"])
def test_r3_trains_on_the_experts_of_the_rollout(
    model: Dots1ForCausalLM, sampled: list[Trajectory], shifted_routes: list[Trajectory], experts: str
) -> None:
    model.set_experts_implementation(experts)
    seen = []
    update = make_update(model, rl_recipe(router={"replay": "R3"}, mismatch={"stop_above": None}))
    train_batch = update.engine.train_batch

    def watched(trajectories, members, loss, observer, **keys):
        def observe(scores, recorded) -> None:
            observer(scores, recorded)
            for row, index in enumerate(scores.members):
                span = scores.places[row][:-1]
                seen.append(recorded.routes[0][span].numpy().tobytes() == shifted_routes[index].routes)

        return train_batch(trajectories, members, loss, observe, **keys)

    update.engine.train_batch = watched  # pyright: ignore[reportAttributeAccessIssue]
    before = weights(model)
    metrics = update(shifted_routes, 0)
    assert seen == [True] * 12
    assert metrics["agreement_flips"] == 0
    assert metrics["mismatch_router_shift"] > 0.9  # what the router itself would have chosen
    moved = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert {f"model.layers.{layer}.mlp.gate.weight" for layer, _ in moe_layers(model)} <= moved


def test_replaying_what_the_router_chooses_changes_nothing(model: Dots1ForCausalLM, sampled: list[Trajectory]) -> None:
    (plain, wanted), (replayed, found) = (updated(model, sampled, router={"replay": name}) for name in ("none", "R3"))
    assert largest_difference(plain, model) > 1e-4
    assert largest_difference(plain, replayed) < 1e-6
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_r2_holds_the_experts_of_the_first_policy(model: Dots1ForCausalLM, sampled: list[Trajectory]) -> None:
    """Over several updates, whatever the rollout's routes were; with one update there is nothing to hold."""
    without = [replace(t, routes=None) for t in sampled]
    keys = {"train": SEVERAL, "optim": {"learning_rate": 1e-2, "adam_epsilon": 1e-4}}
    r2, _ = updated(model, without, router={"replay": "R2"}, **keys)
    r3, _ = updated(model, sampled, router={"replay": "R3"}, **keys)
    none, _ = updated(model, sampled, **keys)
    # The first policy is the one that sampled: both hold the same experts.
    assert largest_difference(r2, r3) < 1e-5
    assert largest_difference(r2, none) > 1e-4


def test_r3_without_routes_is_an_error(model: Dots1ForCausalLM, sampled: list[Trajectory]) -> None:
    without = [replace(sampled[0], routes=None), *sampled[1:]]
    with pytest.raises(ValueError, match=r"router\.replay: the routes of response 0 .* are missing"):
        updated(model, without, router={"replay": "R3"})
    foreign = [replace(sampled[0], routes=(sampled[0].routes or b"")[:-1]), *sampled[1:]]
    with pytest.raises(ValueError, match="do not belong to"):
        updated(model, foreign, router={"replay": "R3"})


def test_replay_survives_activation_checkpointing(model: Dots1ForCausalLM, shifted_routes: list[Trajectory]) -> None:
    keys = {"router": {"replay": "R3"}, "mismatch": {"stop_above": None}}
    plain, _ = updated(model, shifted_routes, **keys)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, _ = updated(model, shifted_routes, **keys)
    assert largest_difference(plain, checkpointed) < 1e-7


# ------------------------------------------------------------------------------------------------------------------ PPO


@pytest.fixture
def critic(model_dir: Path) -> Any:
    """One whose values are not all 0."""
    made = load_critic(ModelSection(path=str(model_dir)), ParallelSection(), False)
    with torch.no_grad():
        made.lm_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return made


def ppo(
    model: Any, critic: Any, sampled: list[Trajectory], steps: int = 1, of_critic: Any = None, **sections: Any
) -> tuple[Any, Any, list]:
    """Copies of both after some steps on the same rollout, and the metrics of each step."""
    policy, learner = copy.deepcopy(model), copy.deepcopy(critic)
    values = {"optim": {"learning_rate": 1e-3, "adam_epsilon": 1e-4}, **(of_critic or {})}
    gate = {"stop_above": None}  # the rollout is not made anew
    recipe = rl_recipe("ppo", critic=values, mismatch=gate, **sections)
    update = make_update(policy, recipe, copy.deepcopy(model), learner)
    return policy, learner, [update(sampled, step) for step in range(steps)]


def test_micro_batches_change_nothing_in_ppo(model: Dots1ForCausalLM, critic: Any, sampled: list[Trajectory]) -> None:
    keys = {"algorithm": {"kl_coef": 0.05, "lam": 0.9, "gamma": 0.99}}
    one, ours, found = ppo(model, critic, sampled, train={"micro_batch_tokens": 10_000, **SEVERAL}, **keys)
    other, theirs, wanted = ppo(model, critic, sampled, train={"micro_batch_tokens": 40, **SEVERAL}, **keys)
    assert largest_difference(one, model) > 1e-4
    assert largest_difference(ours, critic) > 1e-4
    assert largest_difference(one, other) < 2e-6
    assert largest_difference(ours, theirs) < 2e-6
    assert found[0] == pytest.approx(wanted[0], rel=2e-3, abs=1e-5)


def test_the_critic_learns_what_answers_are_worth(
    model: Dots1ForCausalLM, critic: Any, sampled: list[Trajectory]
) -> None:
    _, _, metrics = ppo(model, critic, sampled, steps=8, of_critic={"cliprange_value": 5.0})
    assert metrics[-1]["value_loss"] < 0.5 * metrics[0]["value_loss"]
    assert metrics[-1]["value_explained"] > metrics[0]["value_explained"]


def test_in_the_warm_up_only_the_critic_learns(model: Dots1ForCausalLM, critic: Any, sampled: list[Trajectory]) -> None:
    policy, learner, metrics = ppo(model, critic, sampled, steps=2, of_critic={"warmup_steps": 2})
    assert largest_difference(policy, model) == 0
    assert largest_difference(learner, critic) > 1e-4
    assert "loss" not in metrics[0]
    policy, _, metrics = ppo(model, critic, sampled, steps=3, of_critic={"warmup_steps": 2})
    assert largest_difference(policy, model) > 1e-4
    assert "loss" in metrics[2]
