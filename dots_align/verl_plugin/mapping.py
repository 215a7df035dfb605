"""A recipe as verl's configuration. Every key has its place there, or is refused by name: none is left out silently."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dots_align.config import LoraSection, ModelSection, OptimSection, recipe_dict

STRATEGY = "dots_align"
"""What our engine, rollout and agent loop are called there."""
LOADING = "dots_align.verl_plugin.loading"
_KL_NAMES = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}  # verl's
_OF_A_MICRO_BATCH = ("clip_cov", "kl_cov", "geo_mean")


def refusals(recipe: Any) -> Iterator[str]:
    """What of a recipe verl's trainer cannot do, key by key, each with what to do instead."""
    embedded = "use launch.backend=embedded"
    algorithm, train = recipe.algorithm, recipe.train
    if recipe.rollout.backend != "local":
        yield f"rollout.backend={recipe.rollout.backend}: the plugin samples from the trained weights; use local"
    if recipe.router != type(recipe.router)():
        yield f"router: replay, bias updates and the balance loss hang on the embedded loop; {embedded}"
    for key, given in (("rollout.partial", recipe.rollout.partial), ("train.off_policy_steps", train.off_policy_steps)):
        if given:
            yield f"{key}: verl's trainer has its own way to sample ahead, launch.mode=colocate_async; or {embedded}"
    if recipe.environment is not None:
        yield f"environment: the turns of an environment are the embedded loop's; {embedded}"
    if recipe.parallel.backend != "fsdp":
        yield f"parallel.backend={recipe.parallel.backend}: only fsdp runs inside verl"
    for section in recipe.on_save:
        if section.hook == "stop_early":
            yield f"on_save: stop_early cannot end verl's trainer; {embedded}"
        elif section.in_trainer:
            yield f"on_save: verl's processes run no hooks; give `{section.hook}` in: process"
    if algorithm.advantage_estimator == "remax":
        yield f"algorithm.advantage_estimator=remax: verl's trainer samples no greedy answers for it; {embedded}"
    if algorithm.policy_loss in _OF_A_MICRO_BATCH:
        yield (
            f"algorithm.policy_loss={algorithm.policy_loss} is a statistic of all that it is given, and verl gives it "
            f"one micro-batch; {embedded}"
        )
    if algorithm.max_refill_rounds:
        yield (
            "algorithm.max_refill_rounds: verl refills without a bound on the rounds; set 0 (groups without variance "
            f"then teach nothing, as ever), or {embedded}"
        )
    if algorithm.kl_in == "loss" and algorithm.kl_controller == "adaptive":
        yield "algorithm.kl_controller=adaptive: verl moves only the coefficient of kl_in=reward; use that, or fixed"
    if train.num_prompts_per_step % train.num_minibatches:
        yield (
            f"train.num_minibatches={train.num_minibatches}: verl cuts {train.num_prompts_per_step} prompts a step "
            "into equal parts only; choose a divisor"
        )


def check(recipe: Any) -> None:
    """Raises ValueError if the recipe asks for something that verl's trainer does not do; one line for each."""
    if problems := list(refusals(recipe)):
        raise ValueError("\n".join(f"launch.backend=verl: {problem}" for problem in problems))


def verl_config(recipe: Any, start: ModelSection, record: Path) -> dict[str, Any]:
    """verl's whole configuration: its own defaults under `overrides`, everything filled in.

    Raises:
        ValueError: as `check`.
    """
    check(recipe)
    # hydra only: importing verl for it would cost seconds
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    spec = find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations is not None, "verl is one of the requirements"
    defaults = Path(spec.submodule_search_locations[0]) / "trainer" / "config"
    with initialize_config_dir(str(defaults), version_base=None):
        config = compose("ppo_trainer")
    OmegaConf.set_struct(config, False)
    for section in _REPLACED:
        OmegaConf.update(config, section, {}, merge=False)
    config = OmegaConf.merge(config, overrides(recipe, start, record))
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


_REPLACED = (
    "actor_rollout_ref.actor.fsdp_config",
    "actor_rollout_ref.actor.optim",
    "actor_rollout_ref.ref.fsdp_config",
    "critic.fsdp",
    "critic.optim",
)
"""Sections of verl's own engine, of which nothing is left."""


def overrides(recipe: Any, start: ModelSection, record: Path) -> dict[str, Any]:
    """What the recipe says in verl's configuration.

    Args:
        start: the checkpoint that training starts from. record: the run's run.json, which verl's processes read data
        and rewards from.
    """
    files, path = str(record), os.path.abspath(str(start.path))
    return {
        "actor_rollout_ref": {
            "model": _model(path, recipe.lora),
            "actor": _actor(recipe, start),
            "ref": {"strategy": STRATEGY, "fsdp_config": {**_engine(recipe, start), "forward_only": True}},
            "rollout": _rollout(recipe, record.parent),
        },
        "critic": _critic(recipe, start, path),
        "algorithm": _algorithm(recipe),
        "data": {
            "train_files": files,
            "val_files": files,
            "custom_cls": {"path": "pkg://dots_align.verl_plugin.data", "name": "PromptDataset"},
            "train_batch_size": recipe.train.num_prompts_per_step,
            "max_response_length": recipe.rollout.max_tokens,
            "shuffle": False,
            "dataloader_num_workers": 0,
        },
        "reward": {
            "num_workers": recipe.launch.num_nodes,
            "reward_manager": {
                "source": "importlib",
                "name": "RewardManager",
                "module": {"path": "pkg://dots_align.verl_plugin.reward"},
            },
        },
        "trainer": _trainer(recipe, record.parent),
        "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": recipe.launch.num_nodes}}},
        "ray_kwargs": {"ray_init": _ray(recipe)},
    }


def _updates(recipe: Any) -> int:
    return recipe.train.num_minibatches * recipe.train.num_epochs


def _engine(recipe: Any, start: ModelSection, lora: LoraSection | None = None) -> dict[str, Any]:
    model = start.model_dump(mode="json", include={"dtype", "attn_implementation", "experts_implementation"})
    return {
        "_target_": "dots_align.verl_plugin.config.DotsEngineConfig",
        "strategy": STRATEGY,
        "model": model,
        "parallel": recipe_dict(recipe.parallel),
        "lora": None if lora is None else recipe_dict(lora),
        "mismatch": recipe_dict(recipe.mismatch),
        "bf16": recipe.train.bf16,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "share_prompts": recipe.train.share_prompts,
        "optimizer_offload": recipe.parallel.offload_optimizer,
        "seed": recipe.seed,
        "forward_only": False,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": recipe.train.micro_batch_tokens,
        "infer_max_token_len_per_gpu": recipe.train.micro_batch_tokens,
    }


def _optimizer(optim: OptimSection, num_training_steps: int) -> dict[str, Any]:
    return {
        "_target_": "dots_align.verl_plugin.config.DotsOptimizerConfig",
        "lr": optim.learning_rate,
        "betas": [optim.adam_beta1, optim.adam_beta2],
        "adam_epsilon": optim.adam_epsilon,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.max_grad_norm,
        "lr_scheduler_type": optim.lr_scheduler_type,
        "min_learning_rate": optim.min_learning_rate,
        "lr_warmup_steps": optim.warmup_steps,
        "num_training_steps": num_training_steps,
    }


def _model(path: str, lora: LoraSection | None = None) -> dict[str, Any]:
    rank = 0 if lora is None else lora.r  # verl's reference is the policy without its adapters where this is not 0
    return {"path": path, "lora_rank": rank, "override_config": {"attn_implementation": "eager"}}


def _batches(recipe: Any) -> dict[str, Any]:
    train = recipe.train
    return {
        "strategy": STRATEGY,
        "ppo_mini_batch_size": train.num_prompts_per_step // train.num_minibatches,
        "ppo_epochs": train.num_epochs,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": train.micro_batch_tokens,
        "shuffle": False,
    }


def _actor(recipe: Any, start: ModelSection) -> dict[str, Any]:
    algorithm, warmup = recipe.algorithm, recipe.critic.warmup_steps if recipe.stage == "ppo" else 0
    policy_loss = {
        name: getattr(algorithm, name)
        for name in ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef")
    }
    return {
        **_batches(recipe),
        "fsdp_config": _engine(recipe, start, recipe.lora),
        "optim": _optimizer(recipe.optim, (recipe.train.max_steps - warmup) * _updates(recipe)),
        "clip_ratio": algorithm.clip_ratio_low,
        "clip_ratio_low": algorithm.clip_ratio_low,
        "clip_ratio_high": algorithm.clip_ratio_high,
        "clip_ratio_c": algorithm.clip_ratio_c,
        "tau_pos": algorithm.tau_pos,
        "tau_neg": algorithm.tau_neg,
        "policy_loss": {"loss_mode": algorithm.policy_loss, **policy_loss},
        "loss_agg_mode": algorithm.loss_agg_mode,
        "loss_scale_factor": recipe.rollout.max_tokens,
        "use_kl_loss": algorithm.kl_coef > 0 and algorithm.kl_in == "loss",
        "kl_loss_coef": algorithm.kl_coef,
        "kl_loss_type": _KL_NAMES[algorithm.kl_estimator],
    }


def _critic(recipe: Any, start: ModelSection, path: str) -> dict[str, Any]:
    num_steps = recipe.train.max_steps * _updates(recipe)
    if recipe.stage != "ppo":
        none = {"fsdp": _engine(recipe, start), "optim": _optimizer(OptimSection(), num_steps)}
        return {"enable": False, "strategy": STRATEGY, "model": _model(path), **none}
    return {
        **_batches(recipe),
        "enable": True,
        "fsdp": _engine(recipe, start),
        "optim": _optimizer(recipe.critic.optim, num_steps),
        "model": _model(path if recipe.critic.path is None else os.path.abspath(recipe.critic.path)),
        "cliprange_value": recipe.critic.cliprange_value,
        "loss_agg_mode": "token-mean",
        "ppo_infer_max_token_len_per_gpu": recipe.train.micro_batch_tokens,
    }


def _algorithm(recipe: Any) -> dict[str, Any]:
    algorithm, correction = recipe.algorithm, recipe.rollout_correction
    return {
        "adv_estimator": algorithm.advantage_estimator,
        "norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std,
        "gamma": algorithm.gamma,
        "lam": algorithm.lam,
        "use_kl_in_reward": algorithm.kl_coef > 0 and algorithm.kl_in == "reward",
        "kl_penalty": _KL_NAMES[algorithm.kl_estimator],
        "kl_ctrl": {
            "type": algorithm.kl_controller,
            "kl_coef": algorithm.kl_coef,
            "horizon": algorithm.kl_horizon,
            "target_kl": algorithm.kl_target,
        },
        "rollout_correction": {
            "rollout_is": correction.rollout_is,
            "rollout_is_threshold": correction.rollout_is_threshold,
            "rollout_rs": ",".join(correction.rollout_rs) or None,
            "rollout_rs_threshold": ",".join(map(str, correction.rollout_rs_threshold)) or None,
        },
    }


def _rollout(recipe: Any, run_dir: Path) -> dict[str, Any]:
    keys, launch = recipe.rollout, recipe.launch
    return {
        "name": STRATEGY,
        "n": keys.group_size,
        "temperature": keys.temperature,
        "top_p": keys.top_p,
        "top_k": keys.top_k or -1,
        "max_num_seqs": keys.max_num_sequences,
        "max_num_batched_tokens": keys.prefill_chunk_tokens,
        "tensor_model_parallel_size": launch.num_nodes * launch.processes_per_node,
        "calculate_log_probs": True,
        "free_cache_engine": False,
        "engine_kwargs": {STRATEGY: {"min_p": keys.min_p, "kv_cache_gib": keys.kv_cache_gib}},
        "agent": {
            "num_workers": launch.num_nodes,
            "default_agent_loop": STRATEGY,
            "agent_loop_config_path": str(run_dir / "verl" / "agent_loop.yaml"),
        },
    }


def _trainer(recipe: Any, run_dir: Path) -> dict[str, Any]:
    launch = recipe.launch
    return {
        "nnodes": launch.num_nodes,
        "n_gpus_per_node": launch.processes_per_node,
        "device": "cpu",  # verl puts the accelerator's name here where there is one
        "total_epochs": 1,
        "total_training_steps": recipe.train.max_steps,
        "critic_warmup": recipe.critic.warmup_steps + 1 if recipe.stage == "ppo" else 0,  # verl counts steps from 1
        "save_freq": recipe.save.save_steps or recipe.train.max_steps,
        "default_local_dir": str(run_dir / "verl" / "checkpoints"),
        "checkpoint_callback_class": "dots_align.verl_plugin.publish.Publish",
        "resume_mode": "auto",
        "val_before_train": False,
        "test_freq": -1,
        "logger": ["file"],
        "project_name": "dots_align",
        "experiment_name": recipe.stage,
        "v1": {"trainer_mode": launch.mode, "colocate_async": {"num_warmup_batches": launch.warmup_batches}},
    }


def _ray(recipe: Any) -> dict[str, Any]:
    launch = recipe.launch
    environment = {"VERL_USE_EXTERNAL_MODULES": LOADING, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, Any] = {"runtime_env": {"env_vars": environment}}
    if launch.ray_address is not None:
        return {**found, "address": launch.ray_address}
    store = None if launch.object_store_gib is None else int(launch.object_store_gib * 2**30)
    # A process takes several of Ray's slots for CPUs, whose number is only a count.
    slots = 16 + 8 * launch.processes_per_node
    return {**found, "num_cpus": slots, "include_dashboard": False, "object_store_memory": store}
