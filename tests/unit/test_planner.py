"""The planner: what it reads off the real model, what it counts, and that what it suggests fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dots_align.config import LoraSection, ParallelSection, load_recipe
from dots_align.model.dots1 import preset_config
from dots_align.planner.hardware import GIB, GPUS, H100, H200, Gpu
from dots_align.planner.plan import Plan, make_plan
from dots_align.planner.search import Search
from dots_align.planner.shards import shards_of, shards_of_few_layers
from dots_align.planner.work import Launch, load_of, model_config

ROUTED = {"r": 8, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
FOUR = Launch(1, 4)
SFT: dict[str, Any] = {
    "stage": "sft",
    "output_dir": "out",
    "model": {"preset": "small", "dtype": "bfloat16"},
    "parallel": {"ep": 2},
    "data": {"path": "synthetic:sft"},
    "train": {"per_device_train_batch_size": 2, "max_length": 512, "bf16": True, "gradient_checkpointing": True},
}
GRPO: dict[str, Any] = {
    "stage": "grpo",
    "output_dir": "out",
    "model": {"preset": "small", "dtype": "bfloat16"},
    "parallel": {"ep": 2},
    "data": {"path": "synthetic:prompts"},
    "rewards": [{"function": "a:b"}],
    "rollout": {"group_size": 4, "max_tokens": 100, "max_num_sequences": 8},
    "train": {"num_prompts_per_step": 16, "micro_batch_tokens": 600, "bf16": True},
}


@pytest.fixture
def planned(tmp_path: Path):
    """Plans a recipe with overrides, as the command does."""

    def run(values: dict[str, Any], *overrides: str, launch: Launch = FOUR, prompt_tokens: int = 28) -> Plan:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        recipe = load_recipe(path, overrides)
        return make_plan(recipe, model_config(recipe.model)[0], launch, prompt_tokens, shards_of_few_layers)

    return run


def total(plan: Plan, phase: str) -> int:
    return sum(plan.phases[phase].values())


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def released():
    config = preset_config("llm1")
    return {n: shards_of(config, ParallelSection(ep=8), n, "bfloat16", True, None) for n in (8, 32)}


def test_the_released_model_has_the_published_size(released):
    for shards in released.values():
        assert shards.parameters == pytest.approx(142.774e9, rel=1e-5)
        assert shards.active == pytest.approx(14.017e9, rel=1e-4)
        assert shards.adapter == 0


def test_a_process_holds_its_share_of_the_released_model(released):
    elements = {n: sum(g.elements for g in shards.groups) for n, shards in released.items()}
    assert elements[8] == pytest.approx(17.85e9, rel=1e-3)
    assert elements[32] == pytest.approx(4.46e9, rel=1e-3)
    assert released[8].bytes == 2 * elements[8]
    # bf16 weights need fp32 masters, on the host as on the device.
    assert released[8].optimizer_bytes(offload=False) == 12 * elements[8] == released[8].optimizer_bytes(offload=True)


def test_experts_gather_over_the_processes_that_hold_the_same_ones(released):
    own_experts = 128 // 8 * 3 * 4096 * 1408
    for processes, shards in released.items():
        experts = shards.of("experts", 40)
        assert experts.whole == own_experts
        assert experts.ranks == processes // 8
        assert shards.of("layer", 40).ranks == processes


def test_fp32_parameters_are_their_own_masters():
    config = preset_config("tiny")
    shards = shards_of(config, ParallelSection(), 2, "float32", True, None)
    elements = sum(g.elements for g in shards.groups)
    assert shards.optimizer_bytes(offload=False) == 8 * elements
    assert shards.optimizer_bytes(offload=True) == 12 * elements


@pytest.mark.parametrize("lora", [None, ROUTED])
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (4, {"ep": 4}), (8, {"ep": 2, "dp_replicate": 2})])
def test_few_layers_tell_the_same_as_all(lora, world, parallel):
    adapter = None if lora is None else LoraSection(**lora)
    arguments = (preset_config("small"), ParallelSection(**parallel), world, "float32", True, adapter)
    whole, quick = shards_of(*arguments), shards_of_few_layers(*arguments)
    assert sorted(map(repr, whole.groups)) == sorted(map(repr, quick.groups))
    assert whole.trained == quick.trained


def test_adapters_alone_are_trained():
    config = preset_config("small")
    shards = shards_of(config, ParallelSection(ep=2), 4, "bfloat16", True, LoraSection(**ROUTED))
    assert {"self_attn.q_proj", "mlp.experts.down_proj"} <= shards.trained
    assert "input_layernorm" not in shards.trained
    assert shards.adapter == pytest.approx(4 * shards.trained_elements, rel=0.01)
    assert shards.optimizer_bytes(offload=False) == 8 * shards.trained_elements  # adapters are fp32


# ------------------------------------------------------------------------------------------------- what costs what


def test_every_switch_saves_memory_where_it_says(planned):
    plain = planned(SFT)
    without = planned(SFT, "train.gradient_checkpointing=false")
    assert plain.phases["forward"]["activations"] < without.phases["forward"]["activations"] / 3
    offloaded = planned(SFT, "parallel.offload_optimizer=true")
    assert plain.phases["forward"]["optimizer"] > 0 == offloaded.phases["forward"]["optimizer"]
    assert offloaded.host_bytes - plain.host_bytes == 4 * 16 * plain.shards.trained_elements
    more = planned(SFT, launch=Launch(2, 4))
    assert more.phases["forward"]["parameters"] * 2 == pytest.approx(plain.phases["forward"]["parameters"], rel=0.01)
    wide = planned(SFT, "parallel.ep=4")
    assert wide.phases["backward"]["gathered weights"] < plain.phases["backward"]["gathered weights"]


def test_forwards_before_the_reduction_hold_whole_gradients(planned):
    once, twice = planned(SFT), planned(SFT, "train.gradient_accumulation_steps=2")
    whole = sum(g.whole_trained * 4 for g in once.shards.groups)
    more = twice.phases["forward"]["gradient buffers"] - once.phases["forward"]["gradient buffers"]
    assert more == pytest.approx(whole, rel=0.01)
    assert twice.load.step_tokens == 2 * once.load.step_tokens


def test_pairs_hold_twice_the_tokens(planned):
    dpo = {**SFT, "stage": "dpo"}
    assert planned(dpo).load.work.batch.tokens == 2 * planned(SFT).load.work.batch.tokens == 2 * 2 * 512


def test_prompts_are_cached_once_a_group(planned):
    plan = planned(GRPO)
    config = preset_config("small")
    one_token = config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * 2
    # 8 sequences at once are 2 groups of 4; prompts of 28 and answers of 100 tokens take a block of 256 each.
    assert plan.phases["rollout"]["KV cache"] == one_token * (2 + 8) * 256
    assert planned(GRPO, "rollout.max_num_sequences=4").phases["rollout"]["KV cache"] == one_token * (1 + 4) * 256


def test_the_released_model_caches_about_a_megabyte_a_token(planned, tmp_path: Path):
    released = {**GRPO, "model": {"path": str(tmp_path / "nowhere"), "dtype": "bfloat16"}, "parallel": {"ep": 8}}
    plan = planned(released, launch=Launch(1, 8), prompt_tokens=12)
    assert plan.phases["rollout"]["KV cache"] / ((1 + 4) * 256) / 2 == pytest.approx(1.0158e6, rel=1e-3)
    assert plan.phases["rollout"]["gathered weights"] > 45 * GIB  # whole layers, of all but the other GPUs' experts


def test_a_reference_of_its_own_doubles_the_parameters(planned):
    with_kl = planned(GRPO, "algorithm.kl_coef=0.1")
    assert with_kl.phases["rollout"]["parameters"] == 2 * planned(GRPO).phases["rollout"]["parameters"]
    assert with_kl.load.inferences > 0
    adapted = ("algorithm.kl_coef=0.1", "lora.r=4")
    assert planned(GRPO, *adapted).phases["rollout"]["parameters"] < with_kl.phases["rollout"]["parameters"]


def test_micro_batches_follow_from_the_tokens_of_a_process(planned):
    load = planned(GRPO, "train.num_minibatches=2", "train.num_epochs=3").load
    # 16 prompts on 4 processes, groups of 4, 128 tokens each: 2048 tokens a process, 1024 an update, 600 a forward.
    assert (load.updates, load.forwards, load.inferences, load.waves) == (6, 12, 4, 2)
    assert load.work.batch.tokens == 600
    assert load.step_tokens == 16 * 4 * 128


def test_the_evaluate_hook_needs_a_second_model(planned):
    evaluation = {"data": {"path": "synthetic:heldout"}, "num_prompts": 40, "max_tokens": 50}
    plan = planned({**SFT, "on_save": ["evaluate"], "evaluation": evaluation})
    assert plan.phases["evaluate"]["parameters"] == 2 * plan.phases["forward"]["parameters"]
    assert plan.phases["evaluate"]["KV cache"] > 0
    assert "evaluate" not in planned(SFT).phases


# ------------------------------------------------------------------------------------------------------------ traffic


def test_exactly_the_routed_rows_travel(planned):
    config = preset_config("small")
    one_way = 2 * 512 * config.num_experts_per_tok * config.hidden_size * 2  # bytes of a layer
    moe_layers = config.num_hidden_layers - 1
    assert planned(SFT).traffic.exchange == 6 * moe_layers * one_way
    assert planned(SFT, "train.gradient_checkpointing=false").traffic.exchange == 4 * moe_layers * one_way
    assert planned(SFT, "parallel.ep=1").traffic.exchange == 0


def test_weights_are_gathered_twice_a_forward_and_reduced_once_a_step(planned):
    once, twice = planned(SFT), planned(SFT, "train.gradient_accumulation_steps=2")
    assert twice.traffic.gather == 2 * once.traffic.gather
    assert twice.traffic.reduce == once.traffic.reduce
    whole = sum(g.whole * 2 * (g.ranks - 1) / g.ranks for g in once.shards.groups if g.kind in ("layer", "experts"))
    assert once.traffic.gather == pytest.approx(2 * whole, rel=0.2)  # and the embedding, the head, the routers
    assert planned(SFT, launch=Launch(1, 2)).traffic.gather < once.traffic.gather


def test_time_follows_work_and_bandwidth(planned):
    plan = planned(SFT)
    seconds = plan.seconds[H100.name]
    assert seconds.total == pytest.approx(
        seconds.compute + seconds.exchange + seconds.weights_exposed + seconds.optimizer
    )
    twice = planned(SFT, "train.gradient_accumulation_steps=2").seconds[H100.name]
    assert twice.compute == pytest.approx(2 * seconds.compute)
    assert twice.optimizer == seconds.optimizer
    assert planned(SFT, "train.gradient_checkpointing=false").seconds[H100.name].compute < seconds.compute
    offloaded = planned(SFT, "parallel.offload_optimizer=true").seconds[H100.name]
    assert offloaded.optimizer > 10 * seconds.optimizer
    rollout = planned(GRPO).seconds
    assert rollout[H200.name].rollout < rollout[H100.name].rollout  # decoding reads memory


# -------------------------------------------------------------------------------- critics, reward models, one rollout

PPO: dict[str, Any] = {**GRPO, "stage": "ppo"}
REWARD: dict[str, Any] = {
    **SFT,
    "stage": "reward_model",
    "data": {"path": "synthetic:preference"},
    "on_save": ["evaluate"],
    "evaluation": {"data": {"path": "synthetic:heldout_preference"}, "num_pairs": 40},
}
RFT: dict[str, Any] = {
    **SFT,
    "stage": "rft",
    "data": {"path": "synthetic:prompts"},
    "rewards": [{"function": "a:b"}],
    "rollout": {"group_size": 4, "max_tokens": 100, "max_num_sequences": 8},
}
HEAD = 4096 * 512  # vocabulary times width of `small`


def test_a_model_with_one_number_has_no_vocabulary_to_keep_or_train():
    arguments = (preset_config("small"), ParallelSection(ep=2), 4, "bfloat16", True, None)
    language, scalar = shards_of_few_layers(*arguments), shards_of_few_layers(*arguments, True)
    assert language.parameters - scalar.parameters == HEAD - 512
    assert language.bytes - scalar.bytes == pytest.approx(2 * HEAD / 4, rel=0.01)
    adapted = shards_of_few_layers(*arguments[:-1], LoraSection(**ROUTED), True)
    assert "lm_head" in adapted.trained  # the head of a reward model is new


def test_ppo_keeps_a_critic_and_its_optimizer_beside_every_phase(planned):
    grpo, ppo = planned(GRPO), planned(PPO)
    assert ppo.critic is not None
    assert ppo.critic.parameters == ppo.shards.parameters + 512 - HEAD
    own = ppo.critic.bytes + ppo.critic.optimizer_bytes(offload=False)
    for name, phase in grpo.phases.items():
        assert sum(ppo.phases[name].values()) == sum(phase.values()) + own
    policy = ppo.shards.bytes + ppo.shards.optimizer_bytes(offload=False)
    for name in ("forward", "backward", "optimizer"):
        moment = ppo.phases[f"critic {name}"]
        assert moment["parameters"] + moment["optimizer"] == own + policy
        assert moment["logits"] == 0
        assert moment["KV cache"] == 0
    assert {*ppo.phases} == {*grpo.phases, "critic forward", "critic backward", "critic optimizer"}
    for gpu in GPUS:
        assert 1.5 * grpo.seconds[gpu.name].compute < ppo.seconds[gpu.name].compute
        assert ppo.seconds[gpu.name].rollout == pytest.approx(grpo.seconds[gpu.name].rollout, rel=0.01)


def test_offloaded_the_critics_optimizer_is_in_host_memory_too(planned):
    grpo, ppo = (planned(values, "parallel.offload_optimizer=true") for values in (GRPO, PPO))
    assert ppo.phases["rollout"]["optimizer"] == 0
    assert ppo.host_bytes - grpo.host_bytes == 4 * (12 + 4) * ppo.critic.trained_elements


def test_a_critic_of_its_own_is_planned_by_its_own_shape(planned, tmp_path: Path):
    preset_config("tiny").save_pretrained(tmp_path / "critic")
    small, tiny = planned(PPO), planned(PPO, f"critic.path={tmp_path / 'critic'}")
    assert tiny.critic.parameters < small.critic.parameters / 10
    assert tiny.peak < small.peak


def test_ppo_under_adapters_still_trains_a_whole_critic(planned):
    found = planned({**PPO, "lora": ROUTED})
    assert found.shards.adapter > 0
    assert found.critic.adapter == 0
    assert found.critic.trained_elements > 10 * found.shards.trained_elements


def test_a_reward_model_reads_two_answers_a_pair_and_evaluates_a_second_copy(planned):
    found, sft = planned(REWARD), planned(SFT)
    assert found.load.step_tokens == 2 * sft.load.step_tokens
    assert found.phases["forward"]["logits"] == 0
    assert found.phases["evaluate"]["parameters"] == 2 * found.shards.bytes
    assert found.phases["evaluate"]["KV cache"] == 0
    assert "evaluate" not in planned({**REWARD, "on_save": []}).phases


def test_rft_samples_before_there_is_an_optimizer_and_then_trains_as_sft(planned):
    found, sft, grpo = planned(RFT), planned(SFT), planned(GRPO)
    assert found.phases["rollout"]["optimizer"] == 0
    assert found.phases["rollout"]["KV cache"] == grpo.phases["rollout"]["KV cache"] > 0
    for name, phase in sft.phases.items():
        assert found.phases[name] == phase


# ------------------------------------------------------------------------------------------------------------- search


def _small_gpu(plan: Plan, share: float) -> Gpu:
    """A GPU that has `share` of what the plan needs."""
    gpu = replace(H100, name="small", memory=int((share * plan.peak + 2 * GIB) / 0.96))
    assert gpu.usable == pytest.approx(share * plan.peak, rel=1e-3)
    return gpu


@pytest.mark.parametrize(
    ("values", "share"), [(SFT, 0.6), (SFT, 0.25), (GRPO, 0.5), (PPO, 0.6), (RFT, 0.5), (REWARD, 0.5), (SFT, 1.5)]
)
def test_the_nearest_layout_fits_and_can_be_pasted(planned, values, share):
    plan = planned(values)
    config = preset_config("small")
    gpu = _small_gpu(plan, share)
    found = Search(plan.recipe, config, plan.launch, 28).nearest(gpu)
    assert found is not None
    again = planned(values, *found.overrides, launch=found.launch)
    assert again.recipe == found.recipe
    assert again.fits(gpu)
    assert bool(found.overrides or found.launch != plan.launch) == (share < 1)


def test_mild_changes_come_before_harsh_ones(planned):
    plan = planned(SFT, "train.gradient_checkpointing=false")
    found = Search(plan.recipe, preset_config("small"), plan.launch, 28).nearest(_small_gpu(plan, 0.8))
    assert found is not None
    assert found.overrides == ("train.gradient_checkpointing=true",)
    assert found.launch == plan.launch


def test_nothing_is_suggested_where_nothing_fits(planned):
    plan = planned(SFT)
    assert Search(plan.recipe, preset_config("small"), plan.launch, 28).nearest(_small_gpu(plan, 1e-3)) is None


# ------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("sft_full_4x8", (None, None), (4, 8)),
        ("sft_full_4x8", (2, None), (2, 8)),
        ("sft_full_4x8", (None, 4), (4, 4)),
        ("sft", (None, None), (1, 8)),
    ],
)
def test_the_launch_follows_from_the_name_of_the_recipe(name, given, expected):
    launch = Launch.of(Path(f"{name}.yaml"), *given)
    assert (launch.nodes, launch.gpus_per_node) == expected


def test_a_missing_checkpoint_is_planned_as_the_released_model(tmp_path: Path):
    recipe = load_recipe_of({**SFT, "model": {"path": str(tmp_path / "nowhere")}}, tmp_path)
    config, source = model_config(recipe.model)
    assert config.num_hidden_layers == 62
    assert "is not here" in source


def test_a_checkpoint_says_itself_what_it_is(tmp_path: Path):
    preset_config("tiny", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    recipe = load_recipe_of({**SFT, "model": {"path": str(tmp_path / "model")}}, tmp_path)
    config, source = model_config(recipe.model)
    assert config.num_hidden_layers == 3
    assert source == str(tmp_path / "model")
    assert load_of(recipe, config, Launch(1, 2), 0).step_tokens == 2 * 2 * 512


def load_recipe_of(values: dict[str, Any], folder: Path) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def test_planning_leaves_no_process_group_behind(planned):
    planned(SFT)
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="does not divide"):
        planned(SFT, "parallel.ep=3")
    with pytest.raises(ValueError, match="cannot be split evenly"):
        planned(SFT, "parallel.ep=1", launch=Launch(1, 7))
    assert not torch.distributed.is_initialized()


def test_usable_memory_is_less_than_there_is():
    for gpu in GPUS:
        assert 0.9 * gpu.memory < gpu.usable < gpu.memory
