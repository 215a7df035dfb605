"""The RL loop: prompts -> rollout -> score -> advantage -> update. It reads like the paper; the parts live
elsewhere.
"""

from __future__ import annotations

import functools
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dots_align.checkpoint import Publisher, save_model, staged
from dots_align.config import GrpoRecipe
from dots_align.data.chat import stop_token_ids
from dots_align.data.encoding import encode_prompts
from dots_align.evals.suite import to_response
from dots_align.model.router import RecordedRoutes, find_flips
from dots_align.model.training import ResponseScores, TrainingEngine
from dots_align.objectives.advantages import GROUP_RELATIVE, compute_advantages, zero_variance_groups
from dots_align.objectives.agreement import Agreement
from dots_align.objectives.policy import PolicyObjective
from dots_align.rollout.backend import make_backend, refresh
from dots_align.runtime import MetricsLog, gather_objects, progress, world_size
from dots_align.runtime import rank as process_rank
from dots_align.scoring import RewardSum
from dots_align.stages.routing import router_metrics, watch_router
from dots_align.types import GenerationRequest, Prompt, Sample, SamplingParams, Trajectory

NUM_SAMPLES_LOGGED = 8


class PromptSampler:
    """Prompts in an order that depends on the seed and the position alone, so a resumed run goes on where it
    stopped.
    """

    def __init__(self, num_prompts: int, per_step: int, seed: int) -> None:
        self.num_prompts, self.per_step, self.seed = num_prompts, per_step, seed

    def draw(self, step: int) -> list[tuple[int, int]]:
        """(global position, prompt index) of the prompts of a step, counted from 0; every epoch sees each prompt
        once.
        """
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return [(p, self._order(p // self.num_prompts)[p % self.num_prompts]) for p in positions]

    @functools.cache  # noqa: B019 - one sampler lives as long as its run
    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.num_prompts))
        random.Random(f"prompts-{self.seed}-{epoch}").shuffle(order)
        return order


@dataclass(frozen=True)
class Rollouts:
    """What one step sampled: trajectories in the order of prompts, and what the logs say about them."""

    trajectories: list[Trajectory]
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Scored:
    """A trajectory with the value of each reward function, and what the samples file shows of it."""

    trajectory: Trajectory
    rewards: dict[str, float]
    shown: dict[str, Any]

    def without_routes(self) -> Scored:
        return replace(self, trajectory=replace(self.trajectory, routes=None))


class RlLoop:
    """One policy, its training engine and its rollout engine on the same weights, and the prompts it learns from.

    Args:
        reference: the frozen reference policy; needed only where the KL coefficient is not zero, and the policy has no
        adapters that could be switched off instead.
    """

    def __init__(
        self,
        recipe: GrpoRecipe,
        policy: Any,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        rewards: RewardSum,
    ) -> None:
        train, rollout = recipe.train, recipe.rollout
        self.recipe, self.policy, self.reference = recipe, policy, reference
        self.tokenizer, self.prompts = tokenizer, prompts
        self.prompt_ids = encode_prompts(
            tokenizer,
            [(p.messages, p.source) for p in prompts],
            policy.config.max_position_embeddings,
            rollout.max_tokens,
        )
        self.sampler = PromptSampler(len(prompts), train.num_prompts_per_step, recipe.seed)
        self.rollout_engine = make_backend(rollout, policy)
        self.updates_per_step = train.num_minibatches * train.num_epochs
        self.training_engine = TrainingEngine(
            policy,
            recipe.optim,
            train.max_steps * self.updates_per_step,
            train.micro_batch_tokens,
            rollout.temperature,
            recipe.parallel.offload_optimizer,
        )
        self.rewards = rewards
        self.monitor, self.balance, self.bias = watch_router(policy, recipe.router)
        self.step = 0

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint whose weights the policy was loaded from."""
        self.step = self.training_engine.load(checkpoint)

    def train(self, publisher: Publisher, log: MetricsLog) -> Path:
        """Runs the remaining steps, logs each, publishes as the recipe says; returns the last checkpoint."""
        max_steps, save_steps = self.recipe.train.max_steps, self.recipe.save.save_steps
        with progress(max_steps, self.recipe.stage, "step", initial=self.step) as bar:
            while self.step < max_steps:
                metrics = self.train_step(log)
                bar.set_postfix({name: f"{metrics[f'grpo/{name}']:.3g}" for name in ("reward", "response_length")})
                bar.update()
                if self.step == max_steps or (save_steps and self.step % save_steps == 0):
                    self.publish(publisher, log)
        return publisher.final_path(self.step)

    def train_step(self, log: MetricsLog) -> dict[str, float]:
        """prompts -> rollout -> score -> advantage -> update, once."""
        started = time.monotonic()
        rollouts = self.rollout()
        sampled = time.monotonic()
        update = self.update(rollouts.trajectories)
        self.step += 1
        metrics = {f"grpo/{name}": value for name, value in {**rollouts.metrics, **update}.items()}
        metrics["grpo/rollout_seconds"] = sampled - started
        metrics["grpo/update_seconds"] = time.monotonic() - sampled
        router = router_metrics(log, self.step, self.monitor, self.balance, self.bias)
        metrics |= {f"grpo/router_{name}": value for name, value in router.items()}
        log.log(self.step, metrics)
        log.log_samples(self.step, rollouts.samples)
        return metrics

    def publish(self, publisher: Publisher, log: MetricsLog) -> None:
        """Publishes the policy with everything needed to go on, and runs the hooks."""
        final = publisher.final_path(self.step)
        with staged(final, publisher.manifest(self.step)) as staging:
            save_model(self.policy, self.tokenizer, staging)
            self.training_engine.save(staging, self.step)
        if metrics := publisher.after_publish(final):
            log.log(self.step, metrics)

    def rollout(self) -> Rollouts:
        """Samples a group of responses to each prompt of the step, and scores them; every process its share of the
        prompts, and all get to know what all have sampled (but for the routes).
        """
        drawn = self.sampler.draw(self.step)
        mine = {group: drawn[group] for group in range(len(drawn)) if self._is_mine(group)}
        refresh(self.rollout_engine, self.policy)
        requests = [self._request(*drawn) for drawn in mine.values()]
        samples = self.rollout_engine.generate(requests, return_routes=self.recipe.rollout.backend == "local")
        errors_before = self.rewards.num_errors
        own = [
            self._scored(group, index, sample)
            for (group, (_, index)), of_group in zip(mine.items(), samples, strict=True)
            for sample in of_group
        ]
        errors = self.rewards.num_errors - errors_before
        theirs = gather_objects(([scored.without_routes() for scored in own], errors))
        everyone = [s for rank, (part, _) in enumerate(theirs) for s in (own if rank == process_rank() else part)]
        everyone.sort(key=lambda s: s.trajectory.group)  # stable: the samples of a group stay in order
        count = len(everyone)
        metrics = {
            "reward": sum(s.trajectory.reward for s in everyone) / count,
            **{f"reward_{name}": sum(s.rewards[name] for s in everyone) / count for name in everyone[0].rewards},
            "reward_errors": float(sum(errors for _, errors in theirs)),
            "response_length": sum(len(s.trajectory.response_ids) for s in everyone) / count,
            "stop_rate": sum(s.shown["finish_reason"] == "stop" for s in everyone) / count,
        }
        # One sample of several prompts says more than several of one.
        shown = [s.shown for s in everyone[:: self.recipe.rollout.group_size][:NUM_SAMPLES_LOGGED]]
        return Rollouts([s.trajectory for s in everyone], metrics, shown)

    def _is_mine(self, group: int) -> bool:
        """Whether this process samples and trains a group."""
        return group % world_size() == process_rank()

    def _scored(self, group: int, index: int, sample: Sample) -> Scored:
        response = to_response(self.tokenizer, self.prompts[index], sample)
        reward, values = self.rewards(response)
        trajectory = Trajectory(
            self.prompt_ids[index], sample.response_ids, sample.rollout_logprobs, group, reward, sample.routes
        )
        shown = {
            "prompt": response.prompt.messages[-1].content,
            "response": response.text,
            "answer": response.prompt.answer,
            "reward": reward,
            "rewards": values,
            "finish_reason": response.finish_reason,
        }
        return Scored(trajectory, values, shown)

    def _request(self, position: int, index: int) -> GenerationRequest:
        keys = self.recipe.rollout
        sampling = SamplingParams(
            temperature=keys.temperature,
            top_p=keys.top_p,
            top_k=keys.top_k,
            min_p=keys.min_p,
            max_tokens=keys.max_tokens,
            stop_token_ids=stop_token_ids(self.tokenizer),
            seed=(self.recipe.seed << 40) + position,
        )
        return GenerationRequest(self.prompt_ids[index], keys.group_size, sampling)

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Advantages over the whole rollout, then `num_epochs` passes of `num_minibatches` optimizer steps."""
        engine, train = self.training_engine, self.recipe.train
        advantages = self._advantages(trajectories)
        groups = [t.group for t in trajectories]
        own = [i for i, group in enumerate(groups) if self._is_mine(group)]
        # With a single update the policy that trains still is the one that sampled: its own log-probs serve as the
        # old ones.
        old = engine.infer_batch(trajectories, own) if self.updates_per_step > 1 else {}
        ref = self._reference_logprobs(trajectories, own)
        silent = zero_variance_groups(torch.tensor([t.reward for t in trajectories]), groups)
        has_kl = self.recipe.algorithm.kl_coef > 0
        all_teach = has_kl or self.recipe.algorithm.advantage_estimator not in GROUP_RELATIVE
        agreement = Agreement()
        observer = functools.partial(_observe, agreement, trajectories)
        steps = []
        for epoch in range(train.num_epochs):
            for number, members in enumerate(split_groups(groups, train.num_minibatches)):
                tokens = sum(len(trajectories[i].response_ids) for i in members)
                objective = PolicyObjective(self.recipe.algorithm, tokens, len(members), self.recipe.rollout.max_tokens)
                loss = functools.partial(_loss, objective, advantages, old, ref)
                # Without variance there is no gradient, unless the KL term gives one; the denominators still count
                # such groups.
                learning = [i for i in members if self._is_mine(groups[i]) and (all_teach or groups[i] not in silent)]
                self._scale_balance_loss(learning)
                first = epoch == 0 and number == 0
                steps.append(engine.train_batch(trajectories, learning, loss, observer if first else None))
                self.bias.after_step()
        agreed = Agreement.merged(gather_objects(agreement))
        return {
            **{name: sum(s.get(name, 0.0) for s in steps) / len(steps) for name in steps[0]},
            **{f"agreement_{name}": value for name, value in agreed.metrics().items()},
            "learning_rate": engine.learning_rate,
            "zero_variance_groups": float(len(silent)),
        }

    def _reference_logprobs(self, trajectories: list[Trajectory], own: list[int]) -> dict[int, torch.Tensor]:
        """Of the reference policy, where the KL term needs them: another model, or this one without its adapters."""
        if not self.recipe.algorithm.kl_coef:
            return {}
        if self.reference is not None:
            return self.training_engine.infer_batch(trajectories, own, self.reference)
        with self.policy.disable_adapter():
            return self.training_engine.infer_batch(trajectories, own)

    def _scale_balance_loss(self, learning: list[int]) -> None:
        if self.balance is not None:
            self.balance.scale = world_size() / max(sum(gather_objects(len(learning))), 1)

    def _advantages(self, trajectories: list[Trajectory]) -> torch.Tensor:
        """[B, T] over the whole rollout, T its longest response."""
        lengths = torch.tensor([len(t.response_ids) for t in trajectories])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        rewards = torch.tensor([t.reward for t in trajectories])
        return compute_advantages(rewards, mask.float(), [t.group for t in trajectories], self.recipe.algorithm)


def split_groups(groups: list[int], count: int) -> list[list[int]]:
    """Indices of the trajectories of each of `count` minibatches: whole groups, in order, as even as they come."""
    distinct = list(dict.fromkeys(groups))
    batch_of = {group: number * count // len(distinct) for number, group in enumerate(distinct)}
    batches: list[list[int]] = [[] for _ in range(count)]
    for index, group in enumerate(groups):
        batches[batch_of[group]].append(index)
    return [batch for batch in batches if batch]


def _padded(rows: dict[int, torch.Tensor], scores: ResponseScores) -> torch.Tensor:
    """[T_i] tensors of the members of a micro-batch as [b, T], zero where there is no token."""
    width = scores.mask.shape[1]
    return torch.stack([torch.nn.functional.pad(rows[i], (0, width - len(rows[i]))) for i in scores.members])


def _loss(
    objective: PolicyObjective,
    advantages: torch.Tensor,
    old: dict[int, torch.Tensor],
    ref: dict[int, torch.Tensor],
    scores: ResponseScores,
) -> tuple[torch.Tensor, dict[str, float]]:
    width = scores.mask.shape[1]
    return objective(
        scores.logprobs,
        _padded(old, scores) if old else scores.logprobs.detach(),
        advantages[scores.members, :width].to(scores.mask.device),
        scores.mask,
        _padded(ref, scores) if ref else None,
    )


def _observe(
    agreement: Agreement, trajectories: list[Trajectory], scores: ResponseScores, recorded: RecordedRoutes
) -> None:
    """Compares the trainer's log-probs and routes with the rollout's, sequence by sequence."""
    (routes,), (gaps,) = recorded.routes, recorded.gaps
    for row, index in enumerate(scores.members):
        trajectory = trajectories[index]
        span = slice(scores.boundaries[row], scores.boundaries[row + 1])
        # A back end that tells no routes has to answer for every difference.
        same = routes[span][:-1].cpu().numpy().tobytes()
        flips = find_flips(routes[span], gaps[span], same if trajectory.routes is None else trajectory.routes)
        size = len(trajectory.response_ids)
        theirs = torch.tensor(trajectory.rollout_logprobs, device=scores.logprobs.device)
        differences = (scores.logprobs[row, :size].detach() - theirs).abs()
        agreement.add(differences, flips.affected[len(trajectory.prompt_ids) - 1 :], flips.num_roots, flips.root_gap)
