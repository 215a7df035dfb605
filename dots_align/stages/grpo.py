"""GRPO and its family: reinforcement learning from verifiable rewards, on our own loop and rollout engine."""

from __future__ import annotations

from pathlib import Path

from dots_align.checkpoint import Publisher, ensure_start, load_state, load_trainable, newest_whole, step_of
from dots_align.config import GrpoRecipe
from dots_align.data.sources import data_hash, load_prompts
from dots_align.evals.on_save import resolve_hooks
from dots_align.model.lora import trainable_summary
from dots_align.runtime import MetricsLog, logger, on_main, open_run_directory, seed_everything
from dots_align.scoring import RewardSum
from dots_align.stages.loop import RlLoop


def run(recipe: GrpoRecipe) -> Path:
    """Trains and returns the last checkpoint's directory."""
    prompts = load_prompts(recipe.data, recipe.seed)
    hooks = resolve_hooks(recipe)
    rewards = RewardSum([(r.function, r.weight) for r in recipe.rewards])
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    start, resume = ensure_start(recipe, run_dir), on_main(lambda: newest_whole(run_dir))
    policy, tokenizer = load_trainable(start, recipe.parallel, recipe.train.bf16, recipe.lora, recipe.seed)
    logger.info("%s: %s", recipe.stage, trainable_summary(policy))
    if resume:
        load_state(policy, resume)
    if recipe.train.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    reference = None
    if recipe.algorithm.kl_coef and recipe.lora is None:
        reference = load_trainable(start, recipe.parallel, recipe.train.bf16)[0].eval()
    loop = RlLoop(recipe, policy, reference, tokenizer, prompts, rewards)
    publisher = Publisher(run_dir, recipe, data_hash(prompts), hooks)
    log = MetricsLog(run_dir, step_of(resume) if resume else 0, recipe.logging.report_to)
    if resume:
        logger.info("resuming from %s", resume)
        publisher.finish_hooks(resume, log)
        loop.resume(resume)
    return loop.train(publisher, log)
