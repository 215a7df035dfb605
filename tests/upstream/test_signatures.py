"""The internals of other libraries that the code leans on, with the parameters it gives them.

Run this first when a version moves: what fails here names what to look at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch

from dots_align.config import AdvantageEstimator, AlgorithmSection, DpoRecipe, LossAggregation, PolicyLoss, SftRecipe


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def accepts(function: Callable[..., Any], *names: str) -> bool:
    return set(names) <= set(parameters(function))


# ------------------------------------------------------------------------------------------------------------------ trl


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer"])
def test_trl_trainers_save_through_the_methods_we_override(name: str) -> None:
    import transformers
    import trl

    trainer = getattr(trl, name)
    assert issubclass(trainer, transformers.Trainer)
    assert parameters(trainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(trainer._get_output_dir) == ["self", "trial"]
    assert callable(trainer.create_model_card)
    assert "create_model_card" in inspect.getsource(trainer._save_checkpoint)
    # transformers writes to <_get_output_dir>/checkpoint-<step>, and nowhere else.
    source = inspect.getsource(transformers.Trainer._save_checkpoint)
    assert "self._get_output_dir(trial=trial)" in source
    assert "PREFIX_CHECKPOINT_DIR" in source
    assert transformers.trainer_utils.PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert accepts(trainer.train, "resume_from_checkpoint")
    assert accepts(trainer.__init__, "model", "args", "train_dataset", "processing_class", "callbacks")


@pytest.mark.parametrize(
    ("name", "recipe", "extra"),
    [
        ("SFTConfig", SftRecipe, {"packing", "padding_free", "max_length"}),
        ("DPOConfig", DpoRecipe, {"beta", "loss_type", "loss_weights", "precompute_ref_log_probs"}),
    ],
)
def test_trl_configs_know_every_argument_we_give(name: str, recipe: Any, extra: set[str]) -> None:
    import trl

    from dots_align.stages.trainer import trainer_arguments

    stage = "sft" if recipe is SftRecipe else "dpo"
    given = trainer_arguments(recipe(stage=stage, output_dir="out", data={"path": "synthetic:sft"}), None, False)
    assert set(given) | extra <= set(parameters(getattr(trl, name).__init__))


def test_trls_vllm_client_takes_what_we_give_it() -> None:
    from trl.generation.vllm_client import VLLMClient

    assert {"base_url", "group_port", "connection_timeout"} <= set(parameters(VLLMClient.__init__))
    wanted = {"prompts", "n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "logprobs", "generation_kwargs"}
    assert wanted <= set(parameters(VLLMClient.generate))
    scoring = {"sequences", "prompt_lengths", "top_logprobs", "temperature"}
    assert scoring <= set(parameters(VLLMClient.get_sequence_logprobs))
    assert {"metadata", "named_params"} <= set(parameters(VLLMClient.update_named_params))
    assert "device" in parameters(VLLMClient.init_communicator)
    assert {"get_server_info", "reset_prefix_cache"} <= set(vars(VLLMClient))


def test_trls_padding_free_collator_gives_the_boundaries_our_attention_needs() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert "attention_mask" not in batch
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "seq_lengths": [3, 2]}
    two_rows = collator([packed, {**rows[0], "seq_lengths": [3]}])
    assert two_rows["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert two_rows["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]


# ---------------------------------------------------------------------------------------------------------------- torch


def test_torch_has_the_attention_kernel_for_cpus_that_we_call() -> None:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._schema
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default._schema
    inputs, settings = ["query", "key", "value"], ["dropout_p", "is_causal"]
    options = {"attn_mask", "scale"}
    assert [a.name for a in forward.arguments if a.name not in options] == inputs + settings
    assert [a.name for a in forward.returns] == ["output", "logsumexp"]
    wanted = ["grad_out", *inputs, "out", "logsumexp", *settings]
    assert [a.name for a in backward.arguments if a.name not in options] == wanted
    assert [a.name for a in backward.returns] == ["grad_query", "grad_key", "grad_value"]


# --------------------------------------------------------------------------------------------------------- transformers


def test_transformers_lets_us_register_an_attention_and_its_mask() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from dots_align.model import attention as packed
    from dots_align.rollout import attention as rollout

    assert parameters(AttentionInterface.register) == parameters(AttentionMaskInterface.register) == ["key", "value"]
    assert ALL_ATTENTION_FUNCTIONS[packed.IMPLEMENTATION] is packed.packed_attention
    assert ALL_ATTENTION_FUNCTIONS[rollout.IMPLEMENTATION] is rollout.rollout_attention
    assert ALL_MASK_ATTENTION_FUNCTIONS[packed.IMPLEMENTATION] is packed._mask
    assert accepts(sdpa_mask, "attention_mask")
    ours = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]
    assert parameters(sdpa_attention_forward)[: len(ours)] == ours


def test_dots1_hands_keyword_arguments_to_its_attention_and_has_the_parts_we_read() -> None:
    from transformers import Dots1ForCausalLM
    from transformers.models.dots1 import modeling_dots1 as dots1

    from dots_align.model.dots1 import preset_config

    assert "**kwargs" in inspect.getsource(dots1.Dots1Attention.forward).split("attention_interface(")[1]
    with torch.device("meta"):
        model = Dots1ForCausalLM(preset_config("tiny"))
    decoder = model.get_decoder()
    assert decoder is model.model
    block = decoder.layers[1].mlp
    assert parameters(block.experts.forward) == ["hidden_states", "top_k_index", "top_k_weights"]
    assert parameters(block.gate.forward) == ["hidden_states"]
    assert "e_score_correction_bias" in dict(block.gate.named_buffers())
    assert block.gate.config is model.config
    assert decoder.layers[1].self_attn.layer_idx == 1
    # A mask given as a dict is taken as prepared (rollout/engine.py relies on it).
    assert "isinstance(causal_mask_mapping := attention_mask, dict)" in inspect.getsource(dots1.Dots1Model.forward)


def test_chat_templates_take_our_arguments() -> None:
    from transformers import PreTrainedTokenizerBase

    assert accepts(
        PreTrainedTokenizerBase.apply_chat_template,
        "chat_template",
        "add_generation_prompt",
        "return_assistant_tokens_mask",
        "return_dict",
    )


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_schedules_have_a_state_that_json_holds(name: str) -> None:
    import json

    from transformers import get_scheduler

    assert parameters(get_scheduler)[:4] == ["name", "optimizer", "num_warmup_steps", "num_training_steps"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    state = get_scheduler(name, optimizer, 2, 10).state_dict()
    assert json.loads(json.dumps(state)) == state


# ----------------------------------------------------------------------------------------------------------------- peft


def test_peft_keeps_what_we_build_adapters_from() -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    wanted = ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "base_model_name_or_path")
    assert accepts(LoraConfig.__init__, *wanted)
    assert parameters(get_peft_model)[:2] == ["model", "peft_config"]
    assert parameters(PeftModel.from_pretrained)[:2] == ["model", "model_id"]


# ----------------------------------------------------------------------------------------------------------------- verl


def test_verl_configs_have_the_fields_we_set() -> None:
    from verl.trainer.config import AlgoConfig
    from verl.workers.config import ActorConfig, PolicyLossConfig

    assert accepts(AlgoConfig, "adv_estimator", "norm_adv_by_std_in_grpo", "gamma", "lam")
    assert accepts(
        ActorConfig,
        "strategy",
        "rollout_n",
        "ppo_micro_batch_size_per_gpu",
        "clip_ratio",
        "clip_ratio_low",
        "clip_ratio_high",
        "clip_ratio_c",
        "tau_pos",
        "tau_neg",
        "policy_loss",
    )
    knobs = "loss_mode", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef"
    assert accepts(PolicyLossConfig, *knobs)


@pytest.mark.parametrize("name", get_args(AdvantageEstimator))
def test_verl_has_every_estimator_and_it_takes_what_we_offer(name: str) -> None:
    from verl.trainer.ppo import core_algos

    from dots_align.objectives.advantages import compute_advantages

    offered = {"token_level_rewards", "response_mask", "index", "config", "norm_adv_by_std_in_grpo", "gamma", "lam"}
    offered |= {"reward_baselines", "values"}
    required = {
        key
        for key, parameter in inspect.signature(core_algos.get_adv_estimator_fn(name)).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    assert {"token_level_rewards", "response_mask"} <= required <= offered
    found, returns = compute_advantages(
        torch.tensor([1.0, 0.0]),
        torch.ones(2, 3),
        [0, 0],
        AlgorithmSection(advantage_estimator=name),
        baselines=torch.zeros(2),
        values=torch.zeros(2, 3),
    )
    assert found.shape == returns.shape == (2, 3)


@pytest.mark.parametrize("name", get_args(PolicyLoss))
def test_verl_has_every_policy_loss_and_it_takes_what_we_give(name: str) -> None:
    from verl.trainer.ppo import core_algos

    loss = core_algos.get_policy_loss_fn(name)
    given = ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config"]
    assert parameters(loss)[:6] == given
    rest = list(inspect.signature(loss).parameters.values())[6:]
    assert all(p.default is not p.empty for p in rest)


@pytest.mark.parametrize("mode", get_args(LossAggregation))
def test_verl_aggregates_with_given_denominators(mode: str) -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    given = {"loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size"}
    assert accepts(agg_loss, *given)
    values, mask = torch.ones(2, 4), torch.ones(2, 4)
    assert (
        agg_loss(values, mask, mode, dp_size=1, batch_num_tokens=16, global_batch_size=4)
        == {
            "token-mean": 0.5,
            "token-sum": 8.0,
            "seq-mean-token-sum": 2.0,
            "seq-mean-token-mean": 0.5,
            "seq-mean-token-sum-norm": 0.5,
        }[mode]
    )


def test_verl_names_schulmans_estimators_as_we_do() -> None:
    from verl.trainer.ppo.core_algos import kl_penalty

    from dots_align.objectives.policy import _KL_NAMES

    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    wanted = {"k1": a - b, "k2": (a - b) ** 2 / 2, "k3": (b - a).exp() - (b - a) - 1}
    for name, theirs in _KL_NAMES.items():
        np.testing.assert_allclose(kl_penalty(a, b, theirs).numpy(), wanted[name].numpy(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------- what sharding needs


def test_trainer_hands_over_optimizer_clipping_and_state() -> None:
    import transformers

    trainer = transformers.Trainer
    assert parameters(trainer.create_optimizer) == ["self", "model"]
    assert parameters(trainer._clip_grad_norm) == ["self", "model"]
    assert parameters(trainer._save_optimizer_and_scheduler) == ["self", "output_dir"]
    assert parameters(trainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
    assert parameters(trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert accepts(trainer.save_model, "output_dir", "_internal_call")
    assert "epoch_iterator" in parameters(trainer.get_batch_samples)
    assert "self._clip_grad_norm(" in inspect.getsource(trainer)
    # Losses are a process's share times the number of processes, gradients then the mean over processes.
    assert "self.accelerator.num_processes" in inspect.getsource(trainer.compute_loss)


def test_accelerate_leaves_a_prepared_model_alone_and_accumulates_with_its_no_sync() -> None:
    from accelerate import Accelerator

    assert '"_is_accelerate_prepared"' in inspect.getsource(Accelerator.prepare_model)
    assert '"no_sync"' in inspect.getsource(Accelerator.no_sync)


def test_dpo_hashes_the_reference_by_a_name_in_its_module() -> None:
    from trl.trainer import dpo_trainer

    assert parameters(dpo_trainer.hash_module) == ["module"]
    assert "hash_module(" in inspect.getsource(dpo_trainer.DPOTrainer.__init__)


def test_experts_hand_keyword_arguments_to_their_implementation() -> None:
    from transformers.integrations import moe

    assert "experts_forward(self, *args, **kwargs)" in inspect.getsource(moe.use_experts_implementation)


def test_moe_block_has_the_steps_that_are_run_in_another_order() -> None:
    from transformers.models.dots1.modeling_dots1 import Dots1MoE

    source = inspect.getsource(Dots1MoE.forward)
    steps = ["self.gate(", "self.route_tokens_to_experts(", "self.experts(", "self.shared_experts("]
    assert [source.index(step) for step in steps] == sorted(source.index(step) for step in steps)


def test_fsdp_modules_have_what_sharding_calls() -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    assert accepts(fully_shard, "mesh", "reshard_after_forward", "shard_placement_fn", "mp_policy")
    assert accepts(MixedPrecisionPolicy, "param_dtype", "reduce_dtype", "cast_forward_inputs")
    for name in ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms", "set_requires_gradient_sync"):
        assert callable(getattr(FSDPModule, name))
    assert accepts(FSDPModule.set_reshard_after_forward, "reshard_after_forward", "recurse")


def test_distributed_checkpoints_can_be_safetensors() -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

    assert accepts(HuggingFaceStorageWriter, "path", "fqn_to_index_mapping", "save_distributed")
    assert accepts(HuggingFaceStorageReader, "path")


# ----------------------------------------------------------------------------------------- verl's workers and trainer


def test_verls_engine_asks_for_nothing_that_ours_does_not_have() -> None:
    from verl.workers.engine.base import BaseEngine, BaseEngineCtx, EngineRegistry

    from dots_align.verl_plugin.engine import PolicyAdapter

    # Shards and byte differences are for engines that keep copies of the weights; `infer_batch` and `train_batch` are
    # verl's own, around what we give.
    not_ours = {"get_per_tensor_param_shard", "prime_delta_snapshots", "get_per_tensor_param_delta_shard"}
    wanted = {name for name in vars(BaseEngine) if not name.startswith("_")} - not_ours
    inherited = {"infer_batch", "train_batch", "delta_pin_snapshots"}
    assert wanted - set(vars(PolicyAdapter)) == inherited
    assert "self.optimizer_zero_grad()" in inspect.getsource(BaseEngine.train_batch)
    assert accepts(BaseEngineCtx.__init__, "engine", "mode")
    assert accepts(EngineRegistry.register, "model_type", "backend", "device")


def test_verls_losses_take_what_our_engine_gives_them() -> None:
    from verl.workers.utils.losses import ppo_loss, value_loss

    for loss in (ppo_loss, value_loss):
        assert parameters(loss) == ["config", "model_output", "data", "dp_group"]
        assert "no_padding_2_padding(model_output[" in inspect.getsource(loss)


def test_verl_knows_rollouts_and_platforms_by_what_we_register_them_with() -> None:
    from verl.plugin.platform import PlatformBase, PlatformRegistry
    from verl.utils import distributed
    from verl.workers.rollout import base, replica

    from dots_align.verl_plugin import loading

    assert all(len(key) == 2 and "." in path for key, path in base._ROLLOUT_REGISTRY.items())
    assert accepts(replica.RolloutReplicaRegistry.register, "name", "loader")
    assert {"init_hybrid", "init_standalone", "launch_servers", "sleep"} <= set(vars(replica.RolloutReplica))
    assert not PlatformRegistry.get("cpu").__abstractmethods__  # pyright: ignore
    assert PlatformBase.__abstractmethods__
    assert parameters(distributed.initialize_global_process_group_ray) == parameters(loading._start_processes)
