"""GRPO and its family: reinforcement learning from verifiable rewards, on our own loop and rollout engine."""

from __future__ import annotations

from pathlib import Path

from dots_align.checkpoint import Publisher, ensure_start, load_model, newest_whole, step_of
from dots_align.config import GrpoRecipe
from dots_align.data.sources import data_hash, load_prompts
from dots_align.evals.on_save import resolve_hooks
from dots_align.runtime import MetricsLog, device, logger, open_run_directory, seed_everything, world_size
from dots_align.scoring import load_function
from dots_align.stages.loop import RlLoop


def run(recipe: GrpoRecipe) -> Path:
    """Trains and returns the last checkpoint's directory."""
    if world_size() > 1:
        raise ValueError(f"grpo runs on one process, but was launched on {world_size()}; launch with --num_processes 1")
    prompts = load_prompts(recipe.data, recipe.seed)
    hooks = resolve_hooks(recipe)
    for reward in recipe.rewards:
        load_function(reward.function, "rewards.function")
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    start, resume = ensure_start(recipe, run_dir), newest_whole(run_dir)
    policy, tokenizer = load_model(start.model_copy(update={"path": str(resume)}) if resume else start, device())
    reference = load_model(start, device())[0].eval() if recipe.algorithm.kl_coef else None
    loop = RlLoop(recipe, policy, reference, tokenizer, prompts)
    publisher = Publisher(run_dir, recipe, data_hash(prompts), hooks)
    log = MetricsLog(run_dir, step_of(resume) if resume else 0, recipe.logging.report_to)
    if resume:
        logger.info("resuming from %s", resume)
        publisher.finish_hooks(resume, log)
        loop.resume(resume)
    return loop.train(publisher, log)
