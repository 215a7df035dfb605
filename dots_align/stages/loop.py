"""The RL loop: prompts -> rollout -> score -> advantage -> update. It reads like the paper; the parts live
elsewhere.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dots_align.checkpoint import (
    encode_rollout_prompts,
    ensure_start,
    load_state,
    load_trainable,
    newest_whole,
    save_model,
    staged,
    step_of,
)
from dots_align.config import GrpoRecipe
from dots_align.data.sources import data_hash, load_prompts
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.preference import load_preference_model
from dots_align.evals.publisher import Publisher
from dots_align.model.lora import trainable_summary
from dots_align.model.training import CriticEngine, TrainingEngine
from dots_align.objectives.mismatch import MismatchError
from dots_align.rollout.backend import make_backend, refresh
from dots_align.run_directory import open_run_directory
from dots_align.runtime import MetricsLog, is_main_process, logger, on_main, progress, seed_everything
from dots_align.scoring import RewardSum
from dots_align.stages.ahead import Ahead, bring_up_to_date, can_be_beside, copy_of
from dots_align.stages.buffer import load_rollouts, save_rollouts
from dots_align.stages.critic import CRITIC, load_critic, save_critic
from dots_align.stages.rollouts import Collector, Rollouts
from dots_align.stages.routing import router_metrics, watch_router
from dots_align.stages.update import CriticUpdate, PolicyUpdate, RlRecipe
from dots_align.types import Prompt

STATE = "loop_state.json"


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
        prompt_ids: list[list[int]],
        rewards: RewardSum,
        critic: Any = None,
    ) -> None:
        train, rollout = recipe.train, recipe.rollout
        self.recipe, self.policy, self.tokenizer = recipe, policy, tokenizer
        beside = train.off_policy_steps > 0 and can_be_beside(policy, rollout.backend)
        self.sampling_policy = copy_of(policy) if beside and rollout.backend == "local" else policy
        self.rollout_engine = make_backend(rollout, self.sampling_policy)
        self.collector = Collector(recipe, self.rollout_engine, tokenizer, prompts, prompt_ids, rewards)
        self.ahead = None
        if train.off_policy_steps:
            self.ahead = Ahead(self.collector.collect, self._bring_up_to_date, train.max_steps, beside)
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
        self.monitor, self.balance, self.bias = watch_router(policy, recipe.router)
        self.update = PolicyUpdate(recipe, self.training_engine, reference, self.balance, self.bias, learner)
        self.step = 0

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
        self.collector.position, self.update.kl.value = state["position"], state["kl_coef"]
        self.collector.groups, ahead = load_rollouts(checkpoint)
        if self.ahead is not None:
            self.ahead.put_back(ahead)

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
        if self.ahead is not None:
            self.ahead.close()  # of a run that was stopped early, a batch is still in the making
        publisher.finish(log)
        return publisher.final_path(self.step)

    def train_step(self, log: MetricsLog) -> dict[str, float]:
        """prompts -> rollout -> score -> advantage -> update, once."""
        started = time.monotonic()
        rollouts = self.rollout()
        sampled = time.monotonic()
        # What an update draws at random (dropout of adapters) depends on the step alone.
        seed_everything(((self.recipe.seed << 32) + self.step) % 2**63)
        try:
            update = self.update(rollouts.trajectories, self.step, rollouts.baselines)
        except MismatchError as error:
            # The last line of a run that is stopped says what stopped it.
            told = rollouts.metrics | {f"mismatch_{name}": value for name, value in error.metrics.items()}
            log.log(self.step + 1, {self._name(name): value for name, value in told.items()})
            raise
        self.step += 1
        found = {**rollouts.metrics, **update}
        if self.ahead is not None:
            found["rollout_wait_seconds"] = sampled - started
        found["update_seconds"] = time.monotonic() - sampled
        router = router_metrics(log, self.step, self.monitor, self.balance, self.bias)
        found |= {f"router_{name}": value for name, value in router.items()}
        metrics = {self._name(name): value for name, value in found.items()}
        log.log(self.step, metrics)
        log.log_samples(self.step, self._samples(rollouts))
        return metrics

    def _samples(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        """What `samples.jsonl` tells of a step: of the samples shown, each token's advantage too."""
        lines = []
        for place, shown in rollouts.samples:
            advantages = []  # of a group that dynamic sampling dropped: none
            if place is not None:
                advantages = self.update.advantages[place, : len(shown["tokens"])].tolist()
            if len(set(advantages)) == 1:
                advantages = advantages[:1]  # the same for all tokens, as without a critic
            lines.append({**shown, "advantages": [round(value, 4) for value in advantages]})
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
            ahead = None if self.ahead is None else self.ahead.waiting()  # before the collector is looked at
            save_rollouts(staging, self.collector.groups, ahead)
            if is_main_process():
                state = {"position": self.collector.position, "kl_coef": self.update.kl.value}
                (staging / STATE).write_text(json.dumps(state))
        publisher.after_publish(final, log)

    def rollout(self) -> Rollouts:
        """The batch of this step: made now, or while the step before trained."""
        if self.ahead is not None:
            return self.ahead.take(self.step)
        self._bring_up_to_date()
        return self.collector.collect(self.step, self.step)

    def _bring_up_to_date(self) -> None:
        """Lets what generates have the policy's present weights."""
        if self.sampling_policy is not self.policy:
            bring_up_to_date(self.sampling_policy, self.policy)
        refresh(self.rollout_engine, self.policy)


def run(recipe: RlRecipe) -> Path:
    """Loads, trains and returns the last checkpoint's directory."""
    if recipe.launch.backend != "embedded":
        raise ValueError(
            f"launch.backend={recipe.launch.backend}: only `dots-align {recipe.stage} RECIPE` starts it, no pipeline "
            "does; run this stage by itself, or set launch.backend=embedded"
        )
    prompts = load_prompts(recipe.data, recipe.seed)
    hooks = resolve_hooks(recipe)
    rewards = RewardSum(recipe.rewards, recipe.scoring.num_workers, load_preference_model)
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    start, resume = ensure_start(recipe, run_dir), on_main(lambda: newest_whole(run_dir))
    prompt_ids = encode_rollout_prompts(start, prompts, recipe.rollout.max_tokens)
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
    loop = RlLoop(recipe, policy, reference, tokenizer, prompts, prompt_ids, rewards, critic)
    publisher = Publisher(run_dir, recipe, data_hash(prompts), hooks)
    log = MetricsLog(run_dir, step_of(resume) if resume else 0, recipe)
    if resume:
        logger.info("resuming from %s", resume)
        publisher.finish_hooks(resume, log)
        loop.resume(resume)
    last = loop.train(publisher, log)
    rewards.close()
    return last
