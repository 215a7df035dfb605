"""Rollouts that are scored while others go on, that are carried from step to step, and that are made ahead."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dots_align.model.training import response_scores
from dots_align.runtime import MetricsLog
from dots_align.stages.ahead import Ahead, bring_up_to_date, copy_of
from dots_align.stages.buffer import load_rollouts, save_rollouts
from dots_align.stages.rollouts import Rollouts
from dots_align.types import Trajectory

CORRECTED = {"rollout_is": "token"}
PARTIAL = {"partial": {"chunk_tokens": 2, "extra_prompts": 3, "max_staleness": 2}}


def test_samples_are_scored_while_others_are_still_sampled(loop, tmp_path: Path, monkeypatch) -> None:
    scores = tmp_path / "scores"
    scores.mkdir()
    keys = {"run_in": "worker", "arguments": {"directory": str(scores)}}
    made = loop("leaves_a_file", {"name": "grpo"}, reward_keys=keys, rollout={"max_num_sequences": 1})
    stream, waited = made.rollout_engine.stream, []

    def slow_stream(*arguments: Any, **keywords: Any):
        """Goes on with the second sample when the first one has been scored."""
        for event in stream(*arguments, **keywords):
            yield event
            deadline = time.monotonic() + 300
            while not waited and not list(scores.iterdir()):
                assert time.monotonic() < deadline, "no score while samples were missing"
                time.sleep(0.01)
            waited.append(event)

    monkeypatch.setattr(made.rollout_engine, "stream", slow_stream)
    found = made.rollout()
    assert [t.reward for t in found.trajectories] == [1.0] * 8 == [1.0] * len(waited)
    assert found.metrics["score_busy_seconds"] > 0
    assert found.metrics["rollout_seconds"] >= found.metrics["sampling_seconds"] + found.metrics["score_seconds"] > 0


def test_partial_rollouts_are_the_same_samples_spread_over_steps(loop) -> None:
    plain = loop("length", {"name": "grpo"}, group_size=3)
    whole = {}
    for step in range(4):
        for t in plain.collector.collect(step, step).trajectories:
            whole.setdefault(t.group, []).append(t)
    partial = loop("length", {"name": "grpo"}, group_size=3, rollout=PARTIAL, rollout_correction=CORRECTED)
    seen: list[int] = []
    carried, oldest = [], []
    for step in range(3):
        found = partial.collector.collect(step, step)
        groups = list(dict.fromkeys(t.group for t in found.trajectories))
        for group in groups:
            ours = [t for t in found.trajectories if t.group == group]
            for mine, theirs in zip(ours, whole[group], strict=True):
                assert replace(mine, rollout_logprobs=[]) == replace(theirs, rollout_logprobs=[])
                assert mine.rollout_logprobs == pytest.approx(theirs.rollout_logprobs, abs=1e-5)
        seen += groups
        carried.append(found.metrics["groups_carried"])
        oldest.append(found.metrics["staleness_max"])
    assert len(seen) == len(set(seen)) == 12
    assert partial.collector.position == 12 + 3
    assert carried == [3, 3, 3]
    assert max(oldest) in (1, 2)  # some waited for a step, none for more than it may


def test_prompts_that_must_not_wait_are_taken_along(loop) -> None:
    """However short a round is, nobody is trained on later than `max_staleness` steps after it began."""
    keys = {"partial": {"chunk_tokens": 1, "extra_prompts": 4, "max_staleness": 1}, "max_tokens": 12}
    made = loop("length", {"name": "grpo"}, group_size=4, rollout=keys, rollout_correction=CORRECTED)
    for step in range(5):
        found = made.collector.collect(step, step)
        assert found.metrics["staleness_max"] <= 1
        assert all(group.since == step for group in made.collector.groups)


def test_what_is_in_work_comes_back_from_a_checkpoint(loop, tmp_path: Path) -> None:
    made = loop("length", {"name": "grpo"}, rollout=PARTIAL, rollout_correction=CORRECTED)
    ahead = made.collector.collect(0, 0)
    groups = made.collector.groups
    assert any(m.sample.routes for g in groups for m in g.members)
    save_rollouts(tmp_path, groups, ahead)
    assert load_rollouts(tmp_path) == (groups, ahead)
    again = loop("length", {"name": "grpo"}, rollout=PARTIAL, rollout_correction=CORRECTED)
    again.collector.position, (again.collector.groups, _) = made.collector.position, load_rollouts(tmp_path)
    assert again.collector.collect(1, 1).trajectories == made.collector.collect(1, 1).trajectories


def test_a_run_that_carries_nothing_leaves_no_file(tmp_path: Path) -> None:
    save_rollouts(tmp_path, [], None)
    assert not list(tmp_path.iterdir())
    assert load_rollouts(tmp_path) == ([], None)


def test_baselines_come_back_with_a_batch(tmp_path: Path) -> None:
    batch = Rollouts(
        [Trajectory([1], [2, 3], [-0.1, -1e-30], 5, 0.3)] * 2,
        [0.1, 0.2],
        {"reward": 0.3},
        [(1, {"step": 1}), (None, {})],
    )
    save_rollouts(tmp_path, [], batch)
    assert load_rollouts(tmp_path)[1] == batch


@pytest.mark.parametrize("beside", [False, True])
def test_each_batch_is_made_by_the_policy_before(beside: bool) -> None:
    weights, asked = [0], []

    def collect(step: int, version: int) -> Rollouts:
        asked.append((step, version))
        return Rollouts([], None, {"step": float(step)}, [])

    ahead = Ahead(collect, lambda: weights.append(weights[-1] + 1), 4, beside)
    assert [ahead.take(step).metrics["step"] for step in range(4)] == [0, 1, 2, 3]
    assert asked == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert weights[-1] == 4  # nothing was begun behind the last step
    assert ahead.waiting() is None


def test_what_fails_beside_the_training_fails_the_step() -> None:
    def collect(step: int, _version: int) -> Rollouts:
        if step == 1:
            raise ValueError("no more")
        return Rollouts([], None, {}, [])

    ahead = Ahead(collect, lambda: None, 4, True)
    ahead.take(0)
    with pytest.raises(ValueError, match="no more"):
        ahead.take(1)


def test_a_copy_follows_when_told_and_shares_what_is_frozen(model) -> None:
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    copied = copy_of(model)
    assert copied.model.embed_tokens.weight is frozen
    weight, bias = model.lm_head.weight, model.model.layers[1].mlp.gate.e_score_correction_bias
    with torch.no_grad():
        weight.add_(1)
        bias.add_(1)
    assert not torch.equal(copied.lm_head.weight, weight)
    bring_up_to_date(copied, model)
    assert torch.equal(copied.lm_head.weight, weight)
    assert torch.equal(copied.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert not copied.lm_head.weight.requires_grad
    assert weight.requires_grad


def test_a_run_that_is_stopped_leaves_no_batch_in_the_making(loop, tmp_path: Path) -> None:
    """Whatever comes next in the process would run beside it."""
    keys = {"train": {"off_policy_steps": 1, "max_steps": 4}, "rollout_correction": CORRECTED}
    made, collected = loop("noisy", {"name": "grpo"}, group_size=8, **keys), []

    def slowly(step: int, version: int) -> Rollouts:
        batch = made.collector.collect(step, version)
        time.sleep(0.3 * step)
        collected.append(step)
        return batch

    class StoppedAfterAStep:
        stopped = property(lambda _: made.step > 0)

        def finish(self, log: MetricsLog) -> None: ...

        def final_path(self, step: int) -> Path:
            return tmp_path / f"checkpoint-{step}"

    made.ahead = Ahead(slowly, made._bring_up_to_date, 4, beside=True)
    assert made.train(StoppedAfterAStep(), MetricsLog(tmp_path)).name == "checkpoint-1"
    assert collected == [0, 1]


def test_one_step_off_the_batch_is_that_of_the_weights_before_the_last_step(loop, tmp_path: Path) -> None:
    made = loop(
        "noisy",
        {"name": "grpo"},
        group_size=8,
        train={"off_policy_steps": 1},
        rollout_correction=CORRECTED,
        optim={"learning_rate": 1e-4},
    )
    log = MetricsLog(tmp_path)
    first, between = made.train_step(log), copy.deepcopy(made.policy)
    second, batch = made.train_step(log), made.ahead.waiting()
    assert (first["grpo/staleness_max"], second["grpo/staleness_max"]) == (0, 1)
    assert first["grpo/mismatch_kl"] < 1e-6 < second["grpo/mismatch_kl"]
    assert batch.metrics["staleness"] == 1
    sampled = [torch.tensor(t.rollout_logprobs) for t in batch.trajectories]
    expected = torch.nn.utils.rnn.pad_sequence(sampled, batch_first=True)
    for weights, agree in ((between, True), (made.policy, False)):
        scores = response_scores(weights, batch.trajectories, [[i] for i in range(32)], 1.0)
        assert bool((scores.logprobs - expected).abs().max() < 1e-4) is agree
