"""DeepSpeed, the second back end of SFT and DPO: ZeRO-2 and ZeRO-3, optimizer offload, expert parallelism (AutoEP).

The model, the data, the losses and the checkpoints are those of the first back end; DeepSpeed shards the model, keeps
the optimizer and writes its state beside the checkpoint's weights. Its own writers of weights are not used: under
AutoEP that of ZeRO-2 would store the first process's experts only, and that of ZeRO-3 refuses.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dots_align.checkpoint import load_model
from dots_align.config import ModelSection
from dots_align.data.tokenizer import load_tokenizer
from dots_align.model.dots1 import materialize, meta_model
from dots_align.model.lora import PeftModel, adapter_base, add_adapter, save_adapter
from dots_align.model.merged_files import open_weights
from dots_align.model.sharded_io import Source, fill, hub_tensors, write_files
from dots_align.runtime import device, is_main_process, leave_to_main, on_main, start_processes

Trainer = TypeVar("Trainer", bound=type)

# ------------------------------------------------------------------------------------------------- what is offered


def check_deepspeed(recipe: Any, world_size: int) -> None:
    """Raises ValueError if DeepSpeed cannot compute what a recipe says on this launch; the main process says it, the
    others just end.
    """
    try:
        _check(recipe, world_size)
    except ValueError:
        if is_main_process():
            raise
        leave_to_main()


def _check(recipe: Any, world_size: int) -> None:
    back_end = "parallel.backend=deepspeed"
    if recipe.stage not in ("sft", "dpo"):
        raise ValueError(
            f"{back_end} trains SFT and DPO: rollouts of {recipe.stage} run on the trained weights between two steps, "
            "which DeepSpeed gathers for its own forward only; use parallel.backend=fsdp"
        )
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"{back_end} needs a launcher, for one process too: `torchrun --nproc-per-node {world_size} -m dots_align "
            f"{recipe.stage} …`, or `accelerate launch --config_file recipes/accelerate/….yaml -m dots_align …`"
        )
    for problem, remedy in _refusals(recipe):
        raise ValueError(f"{back_end}: {problem}; {remedy}")


def _refusals(recipe: Any) -> list[tuple[str, str]]:
    """What of a recipe DeepSpeed has not, or computes wrongly, and what to do instead."""
    parallel, router, lora = recipe.parallel, recipe.router, recipe.lora
    cuda, fsdp = torch.cuda.is_available(), "or use parallel.backend=fsdp"
    in_bf16 = recipe.model.dtype == "bfloat16"
    routers_watched = router.bias_policy != "frozen" or router.balance_loss_coef > 0
    cases = [
        (
            parallel.dp_replicate > 1,
            "ZeRO shards over all processes, parallel.dp_replicate is not offered",
            f"leave it at 1, {fsdp}",
        ),
        (
            not parallel.reshard_after_forward,
            "it decides itself what to keep gathered, parallel.reshard_after_forward=false is not offered",
            f"leave it at true, {fsdp}",
        ),
        (
            recipe.train.bf16 and not in_bf16,
            "it computes in the dtype of the weights (and keeps fp32 masters of bfloat16 ones)",
            "set model.dtype=bfloat16, or train.bf16=false",
        ),
        (in_bf16 and not cuda, "model.dtype=bfloat16 needs GPUs here", "set model.dtype=float32"),
        (
            parallel.ep > 1 and lora is not None,
            "under AutoEP the experts cannot be frozen (ZeRO-2 finds no experts to optimise, ZeRO-3 cannot save them)",
            f"set parallel.ep=1, {fsdp}",
        ),
        (
            parallel.ep > 1 and routers_watched,
            "AutoEP replaces the routers, so that router.bias_policy and router.balance_loss_coef would do nothing",
            f"set parallel.ep=1, {fsdp}",
        ),
        (
            parallel.zero_stage == 3 and lora is not None and len(lora.target_parameters) > 0,
            "ZeRO-3 does not gather adapters of the routed experts (lora.target_parameters)",
            f"set parallel.zero_stage=2, {fsdp}",
        ),
        (
            (parallel.offload_optimizer or not cuda) and not (shutil.which("c++") or shutil.which("g++")),
            "it compiles its CPU code when first used, and there is no C++ compiler",
            f"install one (g++), {fsdp}",
        ),
    ]
    return [(problem, remedy) for applies, problem, remedy in cases if applies]


# ------------------------------------------------------------------------------------------------- configuration


def deepspeed_config(recipe: Any, has_cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; what is `auto` transformers fills in from its TrainingArguments."""
    parallel = recipe.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_cuda}
    if parallel.zero_stage == 3:
        sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        zero |= dict.fromkeys(sizes, "auto")
    adamw = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        # Here and not transformers' own: under AutoEP it is built after the experts have been replaced. torch's AdamW,
        # or DeepSpeed's for the host; its fused one would have to be compiled by nvcc.
        "optimizer": {"type": "AdamW", "params": {**adamw, "torch_adam": not parallel.offload_optimizer}},
    }
    if parallel.ep > 1:
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": parallel.ep,
            "preset_model": "deepseek_v3",  # dots1 has the same blocks by the same names
            "use_grouped_mm": has_cuda,  # the activation behind it is a Triton kernel
        }
    return config


def training_arguments(recipe: Any) -> dict[str, Any]:
    """What DeepSpeed adds to, or changes in, the keys of TrainingArguments; joins the other processes."""
    from accelerate import PartialState

    # Where an accelerate config has the type DEEPSPEED or FSDP, its settings would stand against the recipe's.
    for name in list(os.environ):
        if name.startswith("ACCELERATE_DEEPSPEED_") or name in ("ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_USE_FSDP"):
            del os.environ[name]
    cuda = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "deepspeed": deepspeed_config(recipe, cuda),
        "bf16": recipe.model.dtype == "bfloat16",
        "use_cpu": False,  # true means to accelerate: no DeepSpeed
        "log_level": "error",
        "log_level_replica": "error",
        "ddp_timeout": round(60 * recipe.parallel.timeout_minutes),
    }
    if not cuda:
        # Without a GPU accelerate 1.15 knows no distributed DeepSpeed unless it is told the backend, and
        # TrainingArguments cannot tell it; so its state is made here. Not needed once accelerate starts gloo for
        # `ACCELERATE_USE_DEEPSPEED` on machines without accelerators.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo", timeout=timedelta(minutes=recipe.parallel.timeout_minutes))
        arguments["accelerator_config"] = {"use_configured_state": True}
    return arguments


# ------------------------------------------------------------------------------------------------- loading


def load_trainable(start: ModelSection, recipe: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model a stage trains, with its tokenizer: whole with ZeRO-2, partitioned over the processes with ZeRO-3.

    Raises:
        ValueError: as `checkpoint.load_model`.
    """
    if recipe.parallel.zero_stage == 2:
        model, tokenizer = load_model(start, device())
    else:
        directory = Path(str(start.path))
        start_processes(recipe.parallel.timeout_minutes)
        model = _load_partitioned(start, directory)
        tokenizer = load_tokenizer(directory)
    if recipe.lora is not None:
        model = add_adapter(model, recipe.lora, str(start.path), recipe.seed)
    return model, tokenizer


@torch.no_grad()
def _load_partitioned(start: ModelSection, directory: Path) -> Any:
    """A ZeRO-3 model, made one parameter at a time: the main process reads it, then everybody keeps a part of it.

    transformers would read the whole checkpoint into the memory of every process, and go on if a tensor were missing.
    """
    import deepspeed
    from deepspeed.runtime.zero import Init

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False)
    model: Any = meta_model(
        adapter_base(directory) or directory, start.dtype, start.attn_implementation, start.experts_implementation
    )
    files = open_weights(directory)
    convert: Callable[..., None] | None = None
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device()))
            if is_main_process():
                part = tuple(slice(0, size) for size in weight.shape)
                fill(files, f"{path}.{name}", weight.shape, part, weight)
            if convert is None:
                holder = nn.ParameterList([weight])
                Init(module=holder, dtype=weight.dtype)
                convert = weight.convert_to_zero_parameters  # pyright: ignore[reportAttributeAccessIssue]
            else:
                convert(param_list=[weight])
            setattr(module, name, weight)
    materialize(model, device())
    for name, tensor in hub_tensors(model).items():
        if not isinstance(tensor, nn.Parameter):
            tensor.copy_(files.read(name, tuple(tensor.shape), ()))
    model.config.dtype = getattr(torch, start.dtype)
    return model


# ------------------------------------------------------------------------------------------------- training


class _Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever its weight and input are in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float())


def _route_in_fp32() -> None:
    """Makes AutoEP's routers compute their scores in fp32, as dots1's do; its own use the dtype of the model, in which
    near-ties between experts fall the other way. Not needed once AutoEP has an option for it.
    """
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    class Router(TokenChoiceTopKRouter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.gate = _Fp32Linear(self.gate.in_features, self.gate.out_features, bias=False)

    auto_ep_layer.TokenChoiceTopKRouter = Router


def on_deepspeed(trainer_class: Trainer) -> Trainer:
    """A publishing trainer class (`trainer.published_by`) whose model and optimizer are DeepSpeed's."""
    own = transformers.Trainer

    class DeepSpeedTrainer(trainer_class):  # type: ignore[misc, valid-type]
        # DeepSpeed clips by the norm over all shards itself, and keeps the state of the optimizer and the schedule.
        _clip_grad_norm = own._clip_grad_norm
        _save_optimizer_and_scheduler = own._save_optimizer_and_scheduler
        _load_optimizer_and_scheduler = own._load_optimizer_and_scheduler

        def create_optimizer(self, model: Any = None) -> Any:
            """Gives the optimizer that DeepSpeed will make the groups of `model.optimizer.make_optimizer`."""
            trained = [p for p in self.model.parameters() if p.requires_grad]
            decay = {True: self.args.weight_decay, False: 0.0}
            groups = [
                # DeepSpeed 0.19 sorts the experts of each group out by the group's name.
                {"name": f"decay {decay[matrix]}", "weight_decay": decay[matrix], "params": found}
                for matrix in (True, False)
                if (found := [p for p in trained if (len(getattr(p, "ds_shape", p.shape)) > 1) == matrix])
            ]
            self.optimizer.params = groups
            return self.optimizer

        def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
            _route_in_fp32()
            prepared = super()._prepare_for_training(*args, **options)
            # As long as it is set, any `from_pretrained`, of an on-save hook say, would make a partitioned model.
            unset_hf_deepspeed_config()
            return prepared

        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            _route_in_fp32()
            dataset = super()._precompute_ref_logps(*args, **options)  # pyright: ignore[reportAttributeAccessIssue]
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            if self._precompute_engine is not None and "expert_parallel" in config:
                config["expert_parallel"]["enabled"] = False  # TRL's engine has replaced the experts for good
            return dataset

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            assert output_dir is not None
            save_full(self.deepspeed, self.processing_class, Path(output_dir))

    return DeepSpeedTrainer  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------- saving


def save_full(engine: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes what `checkpoint.save_model` writes, from a DeepSpeed engine: weights by the hub's names, every expert in
    its place (an adapter only its own), config and tokenizer. Collective.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = engine.module
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()  # lets go of what is still gathered
    if isinstance(model, PeftModel):
        save_adapter(model, directory, _whole)
    else:
        write_files(_sources(model), directory)
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_epilogue()
    if is_main_process():
        if not isinstance(model, PeftModel):
            model.config.save_pretrained(directory)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@torch.no_grad()
def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a (possibly partitioned) tensor on the host; collective."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor], modifier_rank=None):
        return tensor.detach().to("cpu", copy=True)


def _size(tensor: torch.Tensor) -> int:
    return getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()


def _sources(model: nn.Module) -> dict[str, Source]:
    """The tensors of a checkpoint in transformers' fused layout, in the order of the model."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    stored, sources = set(model.state_dict()), {}
    layers = {path: module for path, module in model.named_modules() if isinstance(module, AutoEPMoELayer)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = layers.get(name.split(".experts.")[0]) if ".experts." in name else None
        if layer is None and name in stored:
            hub_name = name.replace(".router.gate.", ".gate.").replace(".router.", ".gate.")
            sources[hub_name] = Source(_size(tensor), partial(_whole, tensor))
    for path, layer in layers.items():
        gate, down, up = layer.experts.w1, layer.experts.w2, layer.experts.w3
        for name, weights in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            size = sum(map(_size, weights)) * layer.ep_size
            sources[f"{path}.experts.{name}"] = Source(size, partial(_all_experts, layer, weights))
    return sources


def _all_experts(layer: Any, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Weights [local experts, rows, columns] of an AutoEP layer, side by side in rows, of all its experts; collective.

    Returns:
        [experts, sum of rows, columns] on the host.
    """
    gathered = []
    for weight in weights:
        mine = _whole(weight).to(device())
        parts = []
        for owner in range(layer.ep_size):  # one owner's part at a time in the accelerator's memory
            part = mine if owner == layer.ep_rank else torch.empty_like(mine)
            if layer.ep_size > 1:
                dist.broadcast(part, dist.get_global_rank(layer.ep_group, owner), group=layer.ep_group)
            parts.append(part.cpu())
        gathered.append(torch.cat(parts))
    return torch.cat(gathered, dim=1)


def check_resume(checkpoint: Path, world_size: int) -> None:
    """Raises ValueError if a checkpoint's optimizer state was written by another number of processes.

    Also ends what transformers' TrainingArguments began: see `on_deepspeed`.
    """
    unset_hf_deepspeed_config()
    written = on_main(lambda: len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))))
    if written == world_size:
        return
    if not is_main_process():
        leave_to_main()
    raise ValueError(
        f"{checkpoint}: DeepSpeed's optimizer state in it is of {written} processes, this launch has {world_size}; "
        f"launch {written} to resume, or start another run from it (model.path, with another output_dir)"
    )
