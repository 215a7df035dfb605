"""The training engine as verl's workers drive it: their data in, their outputs out. Everything between is
`model.training`'s, so what is learned is what the embedded loop learns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl.utils import tensordict_utils as tu
from verl.utils.py_functional import append_to_dict
from verl.workers.engine.base import BaseEngine, BaseEngineCtx, EngineRegistry

from dots_align.checkpoint import load_state, load_trainable, save_model
from dots_align.config import LoraSection, MismatchSection, ModelSection, OptimSection, ParallelSection
from dots_align.model.training import CriticEngine, TrainingEngine
from dots_align.objectives.mismatch import Mismatch
from dots_align.runtime import gather_objects, on_main, rank, world_size
from dots_align.stages.critic import load_critic, save_critic
from dots_align.types import Trajectory
from dots_align.verl_plugin.mapping import STRATEGY

_policies: list[PolicyAdapter] = []


def policy_here() -> Any:
    """The model that this process trains, for the rollout beside it."""
    assert _policies, "verl makes the policy before its rollout"
    return _policies[-1].training.model


def optim_section(config: Any) -> OptimSection:
    """The recipe's section, from verl's configuration of an optimizer."""
    return OptimSection(
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_scheduler_type,
        min_learning_rate=config.min_learning_rate,
        warmup_steps=max(config.lr_warmup_steps or 0, 0),
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.clip_grad,
    )


def trajectories_of(data: TensorDict) -> list[Trajectory]:
    """The rows of a batch; those that answer the same prompt make a group, and may share its forward."""
    prompts, responses = ([row.tolist() for row in data[name].unbind(0)] for name in ("prompts", "responses"))
    groups: dict[tuple[int, ...], int] = {}
    return [
        Trajectory(prompt, response, [0.0] * len(response), groups.setdefault(tuple(prompt), len(groups)), 0.0)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _sequences(rows: list[torch.Tensor], trajectories: list[Trajectory]) -> list[torch.Tensor]:
    """Numbers of response tokens as verl wants them: one for each token of prompt and response, a token's own at the
    place before it.
    """
    return [torch.nn.functional.pad(row, (len(t.prompt_ids) - 1, 1)) for row, t in zip(rows, trajectories, strict=True)]


class PolicyAdapter(BaseEngine):
    """verl's engine for a language model; every process is a data-parallel rank of its own."""

    output = "log_probs"
    tells_entropy = True

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any = None, **_: Any
    ) -> None:
        self.model_config, self.engine_config, self.optimizer_config = model_config, engine_config, optimizer_config
        self.mode: str | None = None
        self.num_rollouts = 0
        self.tokenizer: Any = None
        self.training: TrainingEngine

    # ------------------------------------------------------------------------------------------------------ set-up

    def initialize(self) -> None:
        config = self.engine_config
        if torch.cuda.is_available():  # verl has chosen this worker's device
            os.environ["DOTS_ALIGN_DEVICE"] = f"cuda:{torch.cuda.current_device()}"
        section = ModelSection(path=self.model_config.path, **_plain(config.model))
        model = self._load(section, ParallelSection(**_plain(config.parallel)))
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.training = self._training(model)

    def _load(self, section: ModelSection, parallel: ParallelSection) -> Any:
        config = self.engine_config
        lora = None if config.lora is None else LoraSection(**_plain(config.lora))
        model, self.tokenizer = load_trainable(section, parallel, config.bf16, lora, config.seed)
        return model

    def _training(self, model: Any) -> TrainingEngine:
        engine = TrainingEngine(model, *self._optimization(), **self._options())
        if not self.engine_config.forward_only:
            _policies.append(self)
        return engine

    def _optimization(self) -> tuple[OptimSection, int, int]:
        """Of a reference, which never steps, nothing is read but the size of its micro-batches."""
        config, tokens = self.optimizer_config, self.engine_config.max_token_len_per_gpu
        if self.engine_config.forward_only:
            return OptimSection(), 1, self.engine_config.infer_max_token_len_per_gpu
        return optim_section(config), config.num_training_steps, tokens

    def _options(self) -> dict[str, bool]:
        config = self.engine_config
        return {"offload_optimizer": config.optimizer_offload, "share_prompts": config.share_prompts}

    # ------------------------------------------------------------------------------------------------- a batch's work

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> dict[str, Any]:
        trajectories = trajectories_of(data)
        self.training.temperature = float(tu.get(data, "temperature", default=1.0))
        self.training.micro_batch_tokens = int(tu.get(data, "max_token_len_per_gpu"))
        if forward_only:
            return self._infer(data, trajectories)
        return self._train(data, trajectories, loss_function)

    def _infer(self, data: TensorDict, trajectories: list[Trajectory]) -> dict[str, Any]:
        entropies: dict[int, torch.Tensor] = {}

        def observe(scores: Any) -> None:
            rows = scores.mask.new_zeros(scores.mask.shape).masked_scatter(scores.mask.bool(), scores.entropy)
            for row, index in enumerate(scores.members):
                entropies[index] = rows[row, : len(trajectories[index].response_ids)]

        wanted = self.tells_entropy and bool(tu.get(data, "calculate_entropy", default=False))
        found = self.training.infer_batch(trajectories, range(len(trajectories)), observer=observe if wanted else None)
        outputs = {self.output: found, **({"entropy": entropies} if wanted else {})}
        if wanted:
            self._check_mismatch(data, found)
        nested = {
            name: torch.nested.as_nested_tensor(
                _sequences([rows[i].float() for i in range(len(trajectories))], trajectories), layout=torch.jagged
            )
            for name, rows in outputs.items()
        }
        return {"model_output": nested, "loss": [0.0], "metrics": {}}

    def _check_mismatch(self, data: TensorDict, logprobs: dict[int, torch.Tensor]) -> None:
        """The gate on what was sampled under other probabilities; verl asks for entropies with the first log-probs of a
        rollout, before any update.
        """
        self.num_rollouts += 1
        if self.engine_config.mismatch is None or "rollout_log_probs" not in data:
            return
        mismatch = Mismatch()
        rows = zip(data["rollout_log_probs"].unbind(0), data["response_mask"].unbind(0), strict=True)
        for index, (sampled, mask) in enumerate(rows):
            mine = logprobs[index].cpu()
            mismatch.add((mine - sampled.cpu())[mask.cpu().bool()], None)
        gate = MismatchSection(**_plain(self.engine_config.mismatch))
        Mismatch.merged(gather_objects(mismatch)).check(gate, self.num_rollouts)

    def _train(
        self, data: TensorDict, trajectories: list[Trajectory], loss_function: Callable[..., Any] | None
    ) -> dict[str, Any]:
        assert loss_function is not None, "verl's workers set one before they train"
        if self.tells_entropy and tu.get(data, "calculate_entropy", default=False):
            raise ValueError(
                "actor_rollout_ref.actor.entropy_coeff and calculate_entropy: dots_align's engine has no gradient of "
                "the entropy; set 0 and false (the entropy is logged all the same)"
            )
        tokens = data["loss_mask"].sum().to(torch.float32).reshape(1)
        dist.all_reduce(tokens)
        tu.assign_non_tensor(data, batch_num_tokens=float(tokens), dp_size=world_size())
        data = data.to(next(self.training.model.parameters()).device)
        metrics: dict[str, Any] = {}

        def loss(scores: Any) -> tuple[torch.Tensor, dict[str, float]]:
            members = [trajectories[i] for i in scores.members]
            rows = [row[: len(t.response_ids)] for row, t in zip(self._rows(scores), members, strict=True)]
            share = tu.index_select_tensor_dict(data, scores.members)
            output = {self.output: torch.cat(_sequences(rows, members))}
            value, found = loss_function(model_output=output, data=share, dp_group=None)
            append_to_dict(metrics, found)
            return value / world_size(), {}  # verl's losses are scaled for gradients that are averaged; ours are summed

        found = self.training.forward_backward_batch(trajectories, range(len(trajectories)), loss)
        return {"model_output": {}, "loss": [found["loss"]], "metrics": metrics}

    def _rows(self, scores: Any) -> torch.Tensor:
        return scores.logprobs

    # ------------------------------------------------------------------------------------- the parts of verl's engine

    @property
    def is_param_offload_enabled(self) -> bool:
        return self.engine_config.param_offload

    @property
    def is_optimizer_offload_enabled(self) -> bool:
        """Never verl's way, between steps: where it is offloaded, the step itself is made in host memory."""
        return False

    def train_mode(self, **options: Any) -> Any:
        return BaseEngineCtx(self, "train", **options)

    def eval_mode(self, **options: Any) -> Any:
        return BaseEngineCtx(self, "eval", **options)

    def optimizer_zero_grad(self) -> None:
        self.training.optimizer_zero_grad()

    def optimizer_step(self) -> float:
        """The schedule moves with every optimizer step, as in the embedded loop; verl moves it once a rollout."""
        norm = self.training.optimizer_step()
        self.training.lr_scheduler_step()
        return norm

    def lr_scheduler_step(self) -> float:
        return self.training.learning_rate

    def get_data_parallel_rank(self) -> int:
        return rank()

    def get_data_parallel_size(self) -> int:
        return world_size()

    def get_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def disable_adapter(self) -> AbstractContextManager[None]:
        return self.training.disable_adapter()

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        self.training.to(device, model, optimizer)

    def get_per_tensor_param(self, **_: Any) -> Any:
        """Nobody iterates where our rollout runs the trained module itself; a model under adapters has nothing else."""
        if hasattr(self.training.model, "peft_config"):
            return iter(()), None
        return self.training.get_per_tensor_param()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **_: Any,
    ) -> None:
        """A checkpoint of ours in `local_path`, which `publish` then seals and moves into the run; collective."""
        if hdfs_path is not None:
            raise ValueError("trainer.default_hdfs_dir: dots_align saves to a shared file system; set it to null")
        directory = Path(local_path)
        self._save_model(directory)
        self.training.save_checkpoint(directory, global_step)

    def _save_model(self, directory: Path) -> None:
        on_main(lambda: directory.mkdir(parents=True, exist_ok=True))
        save_model(self.training.model, self.tokenizer, directory)

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = True, **_: Any
    ) -> None:
        """`del_local_after_load` is not heeded: what it would delete is the run's own checkpoint."""
        load_state(self.training.model, Path(local_path))
        self.num_rollouts = self.training.load_checkpoint(Path(local_path))


class CriticAdapter(PolicyAdapter):
    """verl's engine for a value model."""

    output = "values"
    tells_entropy = False

    def _load(self, section: ModelSection, parallel: ParallelSection) -> Any:
        self.tokenizer = AutoTokenizer.from_pretrained(section.path, local_files_only=True, trust_remote_code=False)
        return load_critic(section, parallel, self.engine_config.bf16)

    def _training(self, model: Any) -> TrainingEngine:
        return CriticEngine(model, *self._optimization(), **self._options())

    def _rows(self, scores: Any) -> torch.Tensor:
        return scores.values

    def _save_model(self, directory: Path) -> None:
        save_critic(self.training.model, self.tokenizer, directory)


def _plain(values: Any) -> dict[str, Any]:
    """A mapping of verl's configuration as plain values; pydantic checks what is in it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(values) if OmegaConf.is_config(values) else dict(values)  # pyright: ignore


EngineRegistry.register(model_type="language_model", backend=STRATEGY, device=["cpu", "cuda"])(PolicyAdapter)
EngineRegistry.register(model_type="value_model", backend=STRATEGY, device=["cpu", "cuda"])(CriticAdapter)
