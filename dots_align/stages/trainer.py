"""What SFT, DPO and reward models share: TRL's trainers, publishing through our checkpoints, logging to our files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dots_align.checkpoint import (
    check_whole,
    checkpoints,
    ensure_start,
    load_state,
    load_trainable,
    newest_whole,
    save_model,
    seal_and_publish,
    step_of,
)
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.publisher import Publisher
from dots_align.model.balance import BalanceLoss, BiasPolicy, count_sequences
from dots_align.model.expert_parallel import clip_grad_norm, reshard
from dots_align.model.lora import trainable_summary
from dots_align.model.optimizer import ShardedAdamW, load_optimizer, make_optimizer, save_optimizer
from dots_align.model.router import LoadMonitor
from dots_align.runtime import (
    MetricsLog,
    barrier,
    device,
    is_main_process,
    logger,
    on_main,
    progress,
    sum_over_processes,
    world_size,
    write_json,
)
from dots_align.stages import zero
from dots_align.stages.routing import router_metrics, watch_router

Trainer = TypeVar("Trainer", bound=type)
STAGING = ".staging"
SCHEDULE = "scheduler.json"


def trainer_arguments(recipe: Any, run_dir: Path, has_cuda: bool) -> dict[str, Any]:
    """The keys of a recipe in the names of transformers' TrainingArguments."""
    train, optim, save = recipe.train, recipe.optim, recipe.save
    return {
        "output_dir": str(run_dir),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_checkpointing": train.gradient_checkpointing,
        "max_length": train.max_length,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.schedule[0],
        "lr_scheduler_kwargs": optim.schedule[1],
        "warmup_steps": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.adam_beta1,
        "adam_beta2": optim.adam_beta2,
        "adam_epsilon": optim.adam_epsilon,
        "max_grad_norm": optim.max_grad_norm,
        "bf16": False,  # what computes in bfloat16, and what does not, is decided where the model is sharded
        "logging_steps": recipe.logging.logging_steps,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": save.save_steps or 10**9,
        "save_total_limit": None,  # the publisher drops old checkpoints: it knows which one is best
        "report_to": "none",
        "use_cpu": not has_cuda,
        "dataloader_pin_memory": has_cuda,
        "disable_tqdm": True,  # the callback below has a bar of its own
        **(zero.training_arguments(recipe) if recipe.parallel.backend == "deepspeed" else {}),
    }


def prepare_model(recipe: Any, run_dir: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model a stage trains, every process its part: the start checkpoint, with fresh adapters if the recipe has
    `lora:`.
    """
    resolve_hooks(recipe)  # what is wrong there should not show after minutes of loading
    start = ensure_start(recipe, run_dir)
    if recipe.parallel.backend == "deepspeed":
        model, tokenizer = zero.load_trainable(start, recipe)
    else:
        scalar_head = recipe.stage == "reward_model"
        options = recipe.parallel, recipe.train.bf16, recipe.lora, recipe.seed, scalar_head
        model, tokenizer = load_trainable(start, *options)
    logger.info("%s: %s", recipe.stage, trainable_summary(model))
    return model, tokenizer


@dataclass
class StageRun:
    """What a trainer works with beside TRL: where checkpoints go, what is logged, what happens to the router."""

    recipe: Any
    publisher: Publisher
    log: MetricsLog
    monitor: LoadMonitor
    balance: BalanceLoss | None
    bias: BiasPolicy


def published_by(trainer_class: Trainer, run: StageRun) -> Trainer:
    """A TRL trainer class on sharded models, with our optimizer, that saves through `run.publisher`: staged, sealed,
    renamed, then the hooks.
    """
    publisher, recipe = run.publisher, run.recipe

    class PublishingTrainer(trainer_class):  # type: ignore[misc, valid-type]
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card for an intermediate checkpoint; the export writes one."""

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                reshard(self.model)  # DPO has computed the reference's log-probs with it
                offload = recipe.parallel.offload_optimizer
                self.optimizer = make_optimizer(self.model.named_parameters(), recipe.optim, offload)
            return self.optimizer

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, num_items = super().get_batch_samples(*args, **kwargs)
            if run.balance is not None and batches:
                sequences = torch.tensor([sum(count_sequences(b) for b in batches)], device=device())
                sum_over_processes(sequences)
                run.balance.scale = world_size() / float(sequences)
            return batches, num_items

        def _clip_grad_norm(self, model: Any) -> torch.Tensor:
            return clip_grad_norm(self.model.parameters(), self.args.max_grad_norm)

        def _get_output_dir(self, trial: Any) -> str:
            return str(publisher.run_dir / STAGING)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # transformers would load the file's tensors by name and ignore the rest: the experts, which have the hub's
            # names in the file and are fused in the model, would silently keep their old weights.
            load_state(self.model, Path(resume_from_checkpoint))
            run.bias = BiasPolicy(run.monitor, recipe.router.bias_policy, recipe.router.bias_update_rate)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_model(self.model, self.processing_class, Path(output_dir))

        def _trained(self) -> dict[str, torch.Tensor]:
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            save_optimizer(unwrapped(self.optimizer), self._trained(), Path(output_dir))
            if self.args.should_save:
                write_json(Path(output_dir) / SCHEDULE, self.lr_scheduler.state_dict())

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                load_optimizer(unwrapped(self.optimizer), self._trained(), Path(checkpoint))
                state = json.loads((Path(checkpoint) / SCHEDULE).read_text(encoding="utf-8"))
                self.lr_scheduler.load_state_dict(state)
                for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                    group["lr"] = rate  # the schedule sets it after the next step only

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            step = self.state.global_step
            staging, final = publisher.run_dir / STAGING, publisher.final_path(step)
            # What a process left that died while saving must not get into the manifest.
            on_main(lambda: shutil.rmtree(staging, ignore_errors=True))
            try:
                super()._save_checkpoint(model, trial)
                barrier()
                on_main(lambda: seal_and_publish(staging / final.name, final, publisher.manifest(step)))
            finally:
                if is_main_process():  # a full disk should not be kept full by half a checkpoint
                    shutil.rmtree(staging, ignore_errors=True)
            publisher.after_publish(final, run.log)
            self.control.should_training_stop |= publisher.stopped

    return PublishingTrainer  # type: ignore[return-value]


def unwrapped(optimizer: Any) -> ShardedAdamW:
    """The optimizer itself, which accelerate wraps."""
    return getattr(optimizer, "optimizer", optimizer)


class StageCallback(TrainerCallback):
    """A progress bar, and what the trainer logs in `metrics.jsonl` under the stage's name, the router's load beside
    it.
    """

    def __init__(self, run: StageRun) -> None:
        self.run, self.stage = run, run.recipe.stage
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = progress(state.max_steps, self.stage, "step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.bias.after_step()
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        values = {f"{self.stage}/{k}": float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if f"{self.stage}/loss" not in values:
            return  # the summary at the end of training, which the run's files already tell
        self.bar.set_postfix(loss=f"{values[f'{self.stage}/loss']:.4f}")
        router = router_metrics(self.run.log, state.global_step, self.run.monitor, self.run.balance, self.run.bias)
        values |= {f"{self.stage}/router_{name}": value for name, value in router.items()}
        self.run.log.log(state.global_step, values)


def _is_last_step(checkpoint: Path) -> bool:
    """Whether training had reached its end; transformers, resumed there, would take one step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def train_and_publish(
    trainer_class: Any, recipe: Any, run_dir: Path, model: Any, data_hash: str, **arguments: Any
) -> Path:
    """Builds the trainer, resumes from the newest whole checkpoint if there is one, trains, publishes the last step.

    Returns:
        the run's last checkpoint.
    """
    deepspeed = recipe.parallel.backend == "deepspeed"
    publisher = Publisher(run_dir, recipe, data_hash, resolve_hooks(recipe))
    resume = on_main(lambda: newest_whole(run_dir))
    log = MetricsLog(run_dir, step_of(resume) if resume else 0, recipe)
    if resume is not None:
        if deepspeed:
            zero.check_resume(resume, world_size())
        publisher.finish_hooks(resume, log)
        if _is_last_step(resume) or publisher.stopped:
            publisher.finish(log)
            logger.info("%s: %s is the last step, nothing is left to do", recipe.stage, resume)
            return resume
        logger.info("resuming from %s", resume)
    run = StageRun(recipe, publisher, log, *watch_router(model, recipe.router))
    publishing = published_by(trainer_class, run)
    if deepspeed:
        publishing = zero.on_deepspeed(publishing)
    trainer = publishing(model=model, callbacks=[StageCallback(run)], **arguments)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.state.global_step not in map(step_of, checkpoints(run_dir)):
        trainer._save_checkpoint(trainer.model, trial=None)
    publisher.finish(log)
    last = publisher.final_path(trainer.state.global_step)
    on_main(lambda: check_whole(last))
    return last
