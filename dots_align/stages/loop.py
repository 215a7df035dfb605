"""The RL loop: prompts -> rollout -> score -> advantage -> update. It reads like the paper; the parts live
elsewhere.
"""

from __future__ import annotations

import functools
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dots_align.checkpoint import (
    ensure_start,
    load_state,
    load_trainable,
    newest_whole,
    save_model,
    staged,
    step_of,
)
from dots_align.config import GrpoRecipe
from dots_align.data.chat import stop_token_ids, token_texts
from dots_align.data.encoding import encode_prompts
from dots_align.data.sources import data_hash, load_prompts
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.preference import load_preference_model
from dots_align.evals.publisher import Publisher
from dots_align.evals.suite import to_response
from dots_align.model.lora import trainable_summary
from dots_align.model.training import CriticEngine, TrainingEngine
from dots_align.objectives.advantages import overlong_penalty, zero_variance_groups
from dots_align.rollout.backend import make_backend, refresh
from dots_align.runtime import (
    MetricsLog,
    gather_objects,
    is_main_process,
    logger,
    on_main,
    open_run_directory,
    progress,
    seed_everything,
)
from dots_align.runtime import rank as process_rank
from dots_align.scoring import RewardSum
from dots_align.stages.critic import CRITIC, load_critic, save_critic
from dots_align.stages.routing import router_metrics, watch_router
from dots_align.stages.update import CriticUpdate, PolicyUpdate, RlRecipe, is_mine
from dots_align.types import GenerationRequest, Prompt, Response, Sample, SamplingParams, Trajectory

NUM_SAMPLES_LOGGED = 8
STATE = "loop_state.json"


class PromptSampler:
    """Prompts in an order that depends on the seed and the position alone, so a resumed run goes on where it
    stopped.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed

    def draw(self, start: int, count: int) -> list[tuple[int, int]]:
        """(position, prompt index) of `count` prompts from position `start` on, counted from 0; every epoch sees each
        prompt once.
        """
        positions = range(start, start + count)
        return [(p, self._order(p // self.num_prompts)[p % self.num_prompts]) for p in positions]

    @functools.cache  # noqa: B019 - one sampler lives as long as its run
    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.num_prompts))
        random.Random(f"prompts-{self.seed}-{epoch}").shuffle(order)
        return order


@dataclass(frozen=True)
class Rollouts:
    """What one step sampled and learns from: trajectories in the order of prompts, the rewards of the greedy answers
    to their prompts where there are any, and what the logs say about all that was sampled.
    """

    trajectories: list[Trajectory]
    baselines: list[float] | None
    metrics: dict[str, float]
    shown: list[Scored]


@dataclass(frozen=True)
class Scored:
    """A trajectory with the sum and the value of each reward function, what the samples file shows of it, and the
    reward of the greedy answer to its prompt, where the algorithm wants that.

    The trajectory's own reward is what teaches: the sum, less what an overlong response loses.
    """

    trajectory: Trajectory
    reward: float
    rewards: dict[str, float]
    shown: dict[str, Any]
    baseline: float | None = None

    def without_routes(self) -> Scored:
        return replace(self, trajectory=replace(self.trajectory, routes=None))


class RlLoop:
    """One policy, its training engine and its rollout engine on the same weights, and the prompts it learns from.

    Args:
        reference: the frozen reference policy; needed only where the KL coefficient is not zero, and the policy has no
        adapters that could be switched off instead.
        critic: of PPO.
    """

    def __init__(
        self,
        recipe: RlRecipe,
        policy: Any,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        rewards: RewardSum,
        critic: Any = None,
    ) -> None:
        train, rollout = recipe.train, recipe.rollout
        self.recipe, self.policy = recipe, policy
        self.tokenizer, self.prompts = tokenizer, prompts
        self.prompt_ids = encode_prompts(
            tokenizer,
            [(p.messages, p.source) for p in prompts],
            policy.config.max_position_embeddings,
            rollout.max_tokens,
        )
        self.sampler = PromptSampler(len(prompts), recipe.seed)
        self.rollout_engine = make_backend(rollout, policy)
        learner = self._critic(critic)
        first = 0 if learner is None else learner.section.warmup_steps
        self.training_engine = TrainingEngine(
            policy,
            recipe.optim,
            (train.max_steps - first) * train.num_minibatches * train.num_epochs,
            train.micro_batch_tokens,
            rollout.temperature,
            recipe.parallel.offload_optimizer,
            train.share_prompts,
        )
        self.rewards = rewards
        self.monitor, self.balance, self.bias = watch_router(policy, recipe.router)
        self.update = PolicyUpdate(recipe, self.training_engine, reference, self.balance, self.bias, learner)
        self.step = 0
        self.position = 0  # of the next prompt to draw

    def _critic(self, model: Any) -> CriticUpdate | None:
        recipe, train = self.recipe, self.recipe.train
        if isinstance(recipe, GrpoRecipe):
            return None
        if model.config.vocab_size != self.policy.config.vocab_size:
            raise ValueError(
                f"critic.path: its vocabulary of {model.config.vocab_size} tokens is not the policy's of "
                f"{self.policy.config.vocab_size}; a critic reads the policy's tokens"
            )
        engine = CriticEngine(
            model,
            recipe.critic.optim,
            train.max_steps * train.num_minibatches * train.num_epochs,
            train.micro_batch_tokens,
            offload_optimizer=recipe.parallel.offload_optimizer,
            share_prompts=train.share_prompts,
        )
        return CriticUpdate(recipe.critic, train, engine)

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint whose weights the policy, and the critic, were loaded from."""
        self.step = self.training_engine.load_checkpoint(checkpoint)
        if self.update.critic is not None:
            self.update.critic.engine.load_checkpoint(checkpoint / CRITIC)
        state = json.loads((checkpoint / STATE).read_text())
        self.position, self.update.kl.value = state["position"], state["kl_coef"]

    def train(self, publisher: Publisher, log: MetricsLog) -> Path:
        """Runs the remaining steps, logs each, publishes as the recipe says; returns the last checkpoint."""
        max_steps, save_steps = self.recipe.train.max_steps, self.recipe.save.save_steps
        with progress(max_steps, self.recipe.stage, "step", initial=self.step) as bar:
            while self.step < max_steps and not publisher.stopped:
                metrics = self.train_step(log)
                bar.set_postfix({name: f"{metrics[self._name(name)]:.3g}" for name in ("reward", "response_length")})
                bar.update()
                if self.step == max_steps or (save_steps and self.step % save_steps == 0):
                    self.publish(publisher, log)
        publisher.finish(log)
        return publisher.final_path(self.step)

    def train_step(self, log: MetricsLog) -> dict[str, float]:
        """prompts -> rollout -> score -> advantage -> update, once."""
        started = time.monotonic()
        rollouts = self.rollout()
        sampled = time.monotonic()
        update = self.update(rollouts.trajectories, self.step, rollouts.baselines)
        self.step += 1
        found = {**rollouts.metrics, **update}
        found["rollout_seconds"] = sampled - started
        found["update_seconds"] = time.monotonic() - sampled
        router = router_metrics(log, self.step, self.monitor, self.balance, self.bias)
        found |= {f"router_{name}": value for name, value in router.items()}
        metrics = {self._name(name): value for name, value in found.items()}
        log.log(self.step, metrics)
        log.log_samples(self.step, self._samples(rollouts))
        return metrics

    def _samples(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        """What `samples.jsonl` tells of a step: texts, rewards, and of each token its text, log-prob and advantage."""
        places = {id(trajectory): index for index, trajectory in enumerate(rollouts.trajectories)}
        lines = []
        for scored in rollouts.shown:
            trajectory, place = scored.trajectory, places.get(id(scored.trajectory))
            advantages = []  # of a group that dynamic sampling dropped: none
            if place is not None:
                advantages = self.update.advantages[place, : len(trajectory.response_ids)].tolist()
            if len(set(advantages)) == 1:
                advantages = advantages[:1]  # the same for all tokens, as without a critic
            tokens = {
                "tokens": token_texts(self.tokenizer, trajectory.response_ids),
                "logprobs": [round(value, 4) for value in trajectory.rollout_logprobs],
                "advantages": [round(value, 4) for value in advantages],
            }
            lines.append({**scored.shown, **tokens})
        return lines

    def _name(self, metric: str) -> str:
        return f"{self.recipe.stage}/{metric}"

    def publish(self, publisher: Publisher, log: MetricsLog) -> None:
        """Publishes the policy with everything needed to go on, and runs the hooks."""
        final = publisher.final_path(self.step)
        with staged(final, publisher.manifest(self.step)) as staging:
            save_model(self.policy, self.tokenizer, staging)
            self.training_engine.save_checkpoint(staging, self.step)
            if self.update.critic is not None:
                critic = self.update.critic.engine
                save_critic(critic.model, self.tokenizer, staging / CRITIC)
                critic.save_checkpoint(staging / CRITIC, self.step)
            if is_main_process():
                state = {"position": self.position, "kl_coef": self.update.kl.value}
                (staging / STATE).write_text(json.dumps(state))
        publisher.after_publish(final, log)

    def rollout(self) -> Rollouts:
        """Samples a group of responses to each prompt of the step, and scores them.

        With dynamic sampling, groups whose rewards are all equal make room for those of other prompts, up to
        `max_refill_rounds` times; what is still missing then is missing. If none is left, all are kept.
        """
        refresh(self.rollout_engine, self.policy)
        wanted, rounds = self.recipe.train.num_prompts_per_step, self.recipe.algorithm.max_refill_rounds
        everything, errors = self._sample(wanted, 0)
        kept, used = informative(everything) if rounds else everything, 0
        while used < rounds and (missing := wanted - num_groups(kept)):
            fresh, more_errors = self._sample(missing, num_groups(everything))
            everything, errors, used = everything + fresh, errors + more_errors, used + 1
            kept += informative(fresh)
        kept = kept or everything
        metrics = self._rollout_metrics(everything) | {"reward_errors": float(errors)}
        if rounds:
            dropped = num_groups(everything) - num_groups(kept)
            metrics |= {"refill_rounds": float(used), "dropped_groups": float(dropped)}
        baselines = [s.baseline for s in kept if s.baseline is not None]
        # One sample of several prompts says more than several of one.
        shown = everything[:: self.recipe.rollout.group_size][:NUM_SAMPLES_LOGGED]
        return Rollouts([s.trajectory for s in kept], baselines or None, metrics, shown)

    def _rollout_metrics(self, scored: list[Scored]) -> dict[str, float]:
        count = len(scored)
        found = {
            "reward": sum(s.reward for s in scored) / count,
            **{f"reward_{name}": sum(s.rewards[name] for s in scored) / count for name in scored[0].rewards},
            "response_length": sum(len(s.trajectory.response_ids) for s in scored) / count,
            "stop_rate": sum(s.shown["finish_reason"] == "stop" for s in scored) / count,
        }
        # Correct as in an evaluation: the first reward function gives at least 1.
        verdicts = [next(iter(s.rewards.values())) >= 1 for s in scored]
        for name, verdict in (("correct", True), ("wrong", False)):
            sizes = [len(s.trajectory.response_ids) for s, v in zip(scored, verdicts, strict=True) if v == verdict]
            if sizes:
                found[f"response_length_{name}"] = sum(sizes) / len(sizes)
        if self.recipe.algorithm.overlong_buffer:
            found["overlong_penalty"] = sum(s.reward - s.trajectory.reward for s in scored) / count
        if scored[0].baseline is not None:
            found["greedy_reward"] = sum(s.baseline or 0.0 for s in scored) / count
        return found

    def _sample(self, count: int, first_group: int) -> tuple[list[Scored], int]:
        """Samples the next `count` prompts; every process its share, and all get to know what all have sampled (but
        for the routes).

        Returns:
            the samples in the order of prompts, and the number of failed rewards.
        """
        drawn = dict(enumerate(self.sampler.draw(self.position, count), first_group))
        self.position += count
        mine = {group: prompt for group, prompt in drawn.items() if is_mine(group)}
        requests = [self._request(*prompt) for prompt in mine.values()]
        samples = self.rollout_engine.generate(requests, return_routes=self.recipe.rollout.backend == "local")
        errors_before = self.rewards.num_errors
        own = self._scored(
            [
                (group, index, sample)
                for (group, (_, index)), of_group in zip(mine.items(), samples, strict=True)
                for sample in of_group
            ]
        )
        if self.recipe.algorithm.advantage_estimator == "remax":
            own = self._with_baselines(mine, own)
        errors = self.rewards.num_errors - errors_before
        theirs = gather_objects(([scored.without_routes() for scored in own], errors))
        everyone = [s for rank, (part, _) in enumerate(theirs) for s in (own if rank == process_rank() else part)]
        everyone.sort(key=lambda s: s.trajectory.group)  # stable: the samples of a group stay in order
        return everyone, sum(errors for _, errors in theirs)

    def _with_baselines(self, mine: dict[int, tuple[int, int]], own: list[Scored]) -> list[Scored]:
        """The same samples with the reward of the greedy answer to their prompt."""
        requests = [self._request(*prompt) for prompt in mine.values()]
        greedy = [
            replace(request, num_samples=1, sampling=replace(request.sampling, temperature=0.0)) for request in requests
        ]
        answers = self.rollout_engine.generate(greedy)
        scored = self._scored(
            [(group, index, answer) for (group, (_, index)), (answer,) in zip(mine.items(), answers, strict=True)]
        )
        rewards = {s.trajectory.group: s.reward for s in scored}
        return [replace(s, baseline=rewards[s.trajectory.group]) for s in own]

    def _scored(self, sampled: list[tuple[int, int, Sample]]) -> list[Scored]:
        """Samples of (group, prompt index), all scored together."""
        responses = [to_response(self.tokenizer, self.prompts[index], sample) for _, index, sample in sampled]
        scores = self.rewards.score(responses)
        return [self._with_score(*s, r, *score) for s, r, score in zip(sampled, responses, scores, strict=True)]

    def _with_score(
        self, group: int, index: int, sample: Sample, response: Response, reward: float, values: dict[str, float]
    ) -> Scored:
        shown = {
            "prompt": response.prompt.messages[-1].content,
            "response": response.text,
            "answer": response.prompt.answer,
            "reward": reward,
            "rewards": values,
            "finish_reason": response.finish_reason,
        }
        recipe, size = self.recipe, len(sample.response_ids)
        taught = reward + overlong_penalty(size, recipe.rollout.max_tokens, recipe.algorithm)
        trajectory = Trajectory(
            self.prompt_ids[index], sample.response_ids, sample.rollout_logprobs, group, taught, sample.routes
        )
        return Scored(trajectory, reward, values, shown)

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


def run(recipe: RlRecipe) -> Path:
    """Loads, trains and returns the last checkpoint's directory."""
    prompts = load_prompts(recipe.data, recipe.seed)
    hooks = resolve_hooks(recipe)
    rewards = RewardSum(recipe.rewards, recipe.scoring.num_workers, load_preference_model)
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    start, resume = ensure_start(recipe, run_dir), on_main(lambda: newest_whole(run_dir))
    policy, tokenizer = load_trainable(start, recipe.parallel, recipe.train.bf16, recipe.lora, recipe.seed)
    logger.info("%s: %s", recipe.stage, trainable_summary(policy))
    reference, critic = None, None
    if recipe.algorithm.kl_coef and recipe.lora is None:
        reference = load_trainable(start, recipe.parallel, recipe.train.bf16)[0].eval()
    if not isinstance(recipe, GrpoRecipe):
        path = recipe.critic.path or start.path
        critic = load_critic(start.model_copy(update={"path": path}), recipe.parallel, recipe.train.bf16)
    for model, stored in ((policy, resume), (critic, resume and resume / CRITIC)):
        if model is not None and stored is not None:
            load_state(model, stored)
        if model is not None and recipe.train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    loop = RlLoop(recipe, policy, reference, tokenizer, prompts, rewards, critic)
    publisher = Publisher(run_dir, recipe, data_hash(prompts), hooks)
    log = MetricsLog(run_dir, step_of(resume) if resume else 0, recipe.logging.report_to)
    if resume:
        logger.info("resuming from %s", resume)
        publisher.finish_hooks(resume, log)
        loop.resume(resume)
    return loop.train(publisher, log)


def informative(scored: list[Scored]) -> list[Scored]:
    """Those of groups whose rewards are not all equal."""
    silent = zero_variance_groups(torch.tensor([s.reward for s in scored]), [s.trajectory.group for s in scored])
    return [s for s in scored if s.trajectory.group not in silent]


def num_groups(scored: list[Scored]) -> int:
    return len({s.trajectory.group for s in scored})
