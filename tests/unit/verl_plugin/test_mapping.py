"""A recipe as verl's configuration: what goes where, and that nothing is left out."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dots_align.config import GrpoRecipe, HookSection, LaunchSection, LoraSection, ModelSection, PpoRecipe
from dots_align.verl_plugin.mapping import overrides, refusals, verl_config

START, RECORD = ModelSection(path="/start"), Path("/run/run.json")
BASE: dict[str, Any] = {
    "output_dir": "out",
    "data": {"path": "synthetic:prompts"},
    "rewards": [{"function": "a:b"}],
    "algorithm": {"kl_coef": 0.1},
    "launch": {"backend": "verl", "processes_per_node": 2},
}
# Read from the run's run.json by the parts that run inside verl, or by `launch` itself.
READ_THERE = re.compile(
    r"(data|rewards|scoring|logging|trackers|evaluation|algorithm\.overlong.*)\b.*|stage|output_dir|overwrite|launch\.backend"
)
# Where verl starts from is an argument (`start`); the limit is the publisher's.
ELSEWHERE = {"model.path", "model.preset", "save.save_total_limit", "algorithm.name"}
# Other values for the keys whose type does not suggest one.
OTHER: dict[str, list[Any]] = {
    "seed": [7],
    "lora": [LoraSection(r=3)],
    "on_save": [(HookSection(hook="evaluate"),)],
    "algorithm.kl_in": ["reward", "loss"],
    "algorithm.kl_controller": ["adaptive"],
    "algorithm.advantage_estimator": ["rloo"],
    "algorithm.policy_loss": ["sapo"],
    "algorithm.loss_agg_mode": ["token-mean", "token-sum"],
    "algorithm.kl_estimator": ["k1", "k2"],
    "critic.path": ["/critic"],
    "launch.ray_address": ["auto"],
    "launch.mode": ["colocate_async"],
    "mismatch.measure": ["max"],
    "mismatch.stop_above": [0.5],
    "model.attn_implementation": ["sdpa"],
    "model.dtype": ["bfloat16"],
    "model.experts_implementation": ["eager"],
    "optim.lr_scheduler_type": ["linear"],
    "critic.optim.lr_scheduler_type": ["linear"],
    "parallel.backend": ["deepspeed"],
    "rollout.backend": ["vllm"],
    "rollout_correction.rollout_is": ["token"],
    "rollout_correction.rollout_is_threshold": [3.0],
    "rollout_correction.rollout_rs": [["token_k2"]],
    "rollout_correction.rollout_rs_threshold": [[1.0]],
    "router.bias_policy": ["track"],
    "router.replay": ["R3"],
    "save.save_steps": [3],
}
# Of back ends that are refused.
REFUSED_WITH = {"parallel.zero_stage", "rollout.vllm"}


def leaves(section: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """Every key of a recipe with its default; lists and optional sections count as one."""
    found: list[tuple[str, Any]] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += leaves(kind, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", None if info.is_required() else info.default))
    return found


def another(key: str, default: Any, now: Any) -> Any:
    if key in OTHER:
        return next(value for value in OTHER[key] if value != now)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 if default else 0.25
    if default is None:
        return 3
    raise AssertionError(f"{key}: say in OTHER what else it could be than {default!r}")


def changed(recipe: Any, key: str, value: Any) -> Any:
    """The recipe with another value in one place, unchecked."""
    name, _, rest = key.partition(".")
    inner = changed(getattr(recipe, name), rest, value) if rest else value
    return recipe.model_copy(update={name: inner})


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_every_key_has_a_place_or_is_refused(stage: str) -> None:
    kind = {"grpo": GrpoRecipe, "ppo": PpoRecipe}[stage]
    recipe = kind.model_validate({**BASE, "stage": stage})
    assert not list(refusals(recipe))
    usual = overrides(recipe, START, RECORD)
    silent = []
    for key, default in leaves(kind):
        if READ_THERE.fullmatch(key) or key in ELSEWHERE | REFUSED_WITH:
            continue
        now: Any = functools.reduce(getattr, key.split("."), recipe)
        value = another(key, default, now)
        other = changed(recipe, key, value)
        start = START.model_copy(update={key.removeprefix("model."): value}) if key.startswith("model.") else START
        if not list(refusals(other)) and overrides(other, start, RECORD) == usual:
            silent.append(key)
    assert silent == []


def test_the_configuration_is_verls_own_with_the_recipe_in_it() -> None:
    recipe = PpoRecipe.model_validate(
        {
            **BASE,
            "stage": "ppo",
            "algorithm": {"clip_ratio_high": 0.28, "lam": 0.95},
            "critic": {"warmup_steps": 2},
            "train": {"num_prompts_per_step": 6, "num_minibatches": 3, "max_steps": 10},
        }
    )
    config = verl_config(recipe, START, RECORD)
    actor, critic = config["actor_rollout_ref"]["actor"], config["critic"]
    assert (actor["clip_ratio_high"], config["algorithm"]["lam"]) == (0.28, 0.95)
    assert actor["ppo_mini_batch_size"] == critic["ppo_mini_batch_size"] == 2
    assert config["trainer"]["critic_warmup"] == 3
    assert actor["optim"]["num_training_steps"] == 24
    assert critic["optim"]["num_training_steps"] == 30
    assert config["actor_rollout_ref"]["rollout"]["tensor_model_parallel_size"] == 2
    assert "wrap_policy" not in actor["fsdp_config"]  # nothing of verl's own engine
    assert config["global_profiler"]["_target_"].startswith("verl.")  # and all else as verl has it
    assert "${" not in str(config)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"algorithm": {"name": "remax"}}, "algorithm.advantage_estimator=remax"),
        ({"algorithm": {"name": "dapo"}}, "algorithm.max_refill_rounds"),
        ({"algorithm": {"name": "clip_cov"}}, "algorithm.policy_loss=clip_cov"),
        ({"router": {"replay": "R3"}}, "router"),
        ({"train": {"num_prompts_per_step": 4, "num_minibatches": 3}}, "train.num_minibatches=3"),
        ({"parallel": {"backend": "deepspeed"}}, "parallel.backend=deepspeed"),
    ],
)
def test_what_verl_cannot_do_is_refused_by_name(sections: dict[str, Any], named: str) -> None:
    recipe = GrpoRecipe.model_validate({**BASE, "stage": "grpo", **sections})
    with pytest.raises(ValueError, match=re.escape(f"launch.backend=verl: {named}")):
        verl_config(recipe, START, RECORD)


def test_how_it_is_launched_does_not_make_another_run_but_by_what_does() -> None:
    from dots_align.run_directory import recipe_hash

    plain = GrpoRecipe.model_validate({**BASE, "stage": "grpo", "launch": {}})
    wider = plain.model_copy(update={"launch": LaunchSection(processes_per_node=4)})
    there = plain.model_copy(update={"launch": LaunchSection(backend="verl")})
    assert recipe_hash(plain) == recipe_hash(wider) != recipe_hash(there)
