"""What SFT and DPO share: TRL's trainers, publishing through our checkpoints and logging to our files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from dots_align.checkpoint import (
    Publisher,
    check_whole,
    checkpoints,
    ensure_start,
    load_model,
    newest_whole,
    publish,
    seal,
    step_of,
)
from dots_align.config import ModelSection
from dots_align.evals.on_save import resolve_hooks
from dots_align.model.lora import PeftModel, add_adapter, trainable_summary
from dots_align.model.router import LoadMonitor, load_metrics
from dots_align.runtime import MetricsLog, device, logger, progress

Trainer = TypeVar("Trainer", bound=type)
STAGING = ".staging"


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
        "lr_scheduler_type": optim.lr_scheduler_type,
        "warmup_steps": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.adam_beta1,
        "adam_beta2": optim.adam_beta2,
        "adam_epsilon": optim.adam_epsilon,
        "max_grad_norm": optim.max_grad_norm,
        "bf16": train.bf16,
        "optim": "adamw_torch_fused",
        "logging_steps": recipe.logging.logging_steps,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": save.save_steps or 10**9,
        "save_total_limit": None,  # the publisher drops old checkpoints: it knows which one is best
        "report_to": "none",
        "use_cpu": not has_cuda,
        "dataloader_pin_memory": has_cuda,
        "disable_tqdm": True,  # the callback below has a bar of its own
    }


def prepare_model(recipe: Any, run_dir: Path) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model a stage trains, on its device: the start checkpoint, with fresh adapters if the recipe has `lora:`."""
    start = ensure_start(recipe, run_dir)
    model, tokenizer = load_model(start, device())
    if recipe.lora is not None:
        model = add_adapter(model, recipe.lora, str(start.path))
    logger.info("%s: %s", recipe.stage, trainable_summary(model))
    return model, tokenizer


def published_by(trainer_class: Trainer, publisher: Publisher, log: MetricsLog) -> Trainer:
    """A TRL trainer class that saves through `publisher`: staged, sealed, renamed, then the hooks."""

    class PublishingTrainer(trainer_class):  # type: ignore[misc, valid-type]
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card for an intermediate checkpoint; the export writes one."""

        def _get_output_dir(self, trial: Any) -> str:
            return str(publisher.run_dir / STAGING)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if publisher.recipe.lora is not None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            # transformers would load the file's tensors by name and ignore the rest: the experts, which have the hub's
            # names in the file and are fused in the model, would silently keep their old weights.
            saved, _ = load_model(ModelSection(path=resume_from_checkpoint, dtype=publisher.recipe.model.dtype))
            (model or self.model).load_state_dict(saved.state_dict())

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if self.args.should_save:  # what a process left that died while saving must not get into the manifest
                shutil.rmtree(publisher.run_dir / STAGING, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            if not self.args.should_save:
                return
            step = self.state.global_step
            staging = publisher.run_dir / STAGING / f"checkpoint-{step}"
            self.processing_class.save_pretrained(staging)
            seal(staging, publisher.manifest(step))
            publish(staging, publisher.final_path(step))
            if metrics := publisher.after_publish(publisher.final_path(step)):
                log.log(step, metrics)

    return PublishingTrainer  # type: ignore[return-value]


class StageCallback(TrainerCallback):
    """A progress bar, and what the trainer logs in `metrics.jsonl` under the stage's name, the router's load beside
    it.
    """

    def __init__(self, stage: str, log: MetricsLog, monitor: LoadMonitor) -> None:
        self.stage, self.log, self.monitor = stage, log, monitor
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = progress(state.max_steps, self.stage, "step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        values = {f"{self.stage}/{k}": float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if f"{self.stage}/loss" not in values:
            return  # the summary at the end of training, which the run's files already tell
        self.bar.set_postfix(loss=f"{values[f'{self.stage}/loss']:.4f}")
        load = self.monitor.take()
        if load is not None:
            self.log.log_router(state.global_step, self.monitor.layers, load)
            values |= {f"{self.stage}/router_{name}": value for name, value in load_metrics(load).items()}
        self.log.log(state.global_step, values)


def _is_last_step(checkpoint: Path) -> bool:
    """Whether training had reached its end; transformers, resumed there, would take one step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def train_and_publish(
    trainer_class: Any, recipe: Any, run_dir: Path, model: PreTrainedModel | PeftModel, data_hash: str, **arguments: Any
) -> Path:
    """Builds the trainer, resumes from the newest whole checkpoint if there is one, trains, publishes the last step.

    Returns:
        the run's last checkpoint.
    """
    publisher = Publisher(run_dir, recipe, data_hash, resolve_hooks(recipe))
    resume = newest_whole(run_dir)
    log = MetricsLog(run_dir, step_of(resume) if resume else 0, recipe.logging.report_to)
    monitor = LoadMonitor(model)
    if resume is not None:
        publisher.finish_hooks(resume, log)
        if _is_last_step(resume):
            logger.info("%s: %s is the last step, nothing is left to do", recipe.stage, resume)
            return resume
        logger.info("resuming from %s", resume)
    trainer = published_by(trainer_class, publisher, log)(
        model=model, callbacks=[StageCallback(recipe.stage, log, monitor)], **arguments
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.state.global_step not in map(step_of, checkpoints(run_dir)):
        trainer._save_checkpoint(trainer.model, trial=None)
    last = publisher.final_path(trainer.state.global_step)
    check_whole(last)
    return last
