"""Our SFT and DPO trainers against TRL's own, on the same batches: losses, gradients, logged numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from transformers import Dots1ForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dots_align.config import DpoLoss, LoraSection
from dots_align.model.lora import add_adapter
from dots_align.stages.losses import LeanDpoTrainer, LeanSftTrainer

TOLERANCE = 1e-5
SFT_METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
DPO_METRICS = (
    *SFT_METRICS,
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",  # not the accuracies: before the first step all rewards are zero up to rounding
)
OPTIONS = {
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-4,  # keeps Adam from blowing the rounding of vanishing gradients up to whole steps
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= TOLERANCE * max(1.0, abs(wanted))


def assert_same_history(ours: Any, theirs: Any, metrics: tuple[str, ...]) -> None:
    """Trains both and compares what every step logged."""
    for trainer in (ours, theirs):
        trainer.train()
    histories = [[line for line in t.state.log_history if "loss" in line] for t in (ours, theirs)]
    assert len(histories[0]) == len(histories[1]) > 1
    for found, wanted in zip(*histories, strict=True):
        assert {m: found[m] for m in metrics if not close(found[m], wanted[m])} == {}, wanted


def watch_head(model: Dots1ForCausalLM) -> list[torch.Size]:
    """Shapes of what the head returns from now on."""
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    return shapes


# ------------------------------------------------------------------------------------------------------------------ SFT


@pytest.fixture
def examples(token_ids: Callable[..., list[list[int]]]) -> list[dict[str, list[int]]]:
    """Twelve conversations whose first halves carry no label; one has no label at all."""
    # Tokens with which no two experts score alike but for rounding, which would then choose between them.
    sequences = token_ids(9, 30, 4, 17, 25, 6, 40, 12, 3, 21, 8, 33, seed=1)
    labels = [[-100] * (len(s) // 2) + s[len(s) // 2 :] for s in sequences]
    labels[3] = [-100] * len(labels[3])
    return [{"input_ids": s, "labels": row} for s, row in zip(sequences, labels, strict=True)]


def sft_trainer(
    trainer_class: type, model: Any, tokenizer: PreTrainedTokenizerFast, rows: list, directory: Path, **options: Any
) -> Any:
    config = SFTConfig(output_dir=str(directory), max_length=None, **{**OPTIONS, **options})
    return trainer_class(model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))


def packed(examples: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Two conversations a row."""
    rows = []
    for first, second in zip(examples[::2], examples[1::2], strict=True):
        row = {key: first[key] + second[key] for key in first}
        rows.append({**row, "seq_lengths": [len(first["input_ids"]), len(second["input_ids"])]})
    return rows


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("attention", ["dots_align_packed", "sdpa"])
def test_sft_logs_what_trl_logs(
    packing: bool, attention: str, model: Dots1ForCausalLM, tokenizer, examples, tmp_path: Path
) -> None:
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("sdpa")
    model.set_attn_implementation(attention)
    rows = packed(examples) if packing else examples
    options = {"padding_free": packing, "per_device_train_batch_size": 1 if packing else 3}
    assert_same_history(
        sft_trainer(LeanSftTrainer, model, tokenizer, rows, tmp_path, **options),
        sft_trainer(SFTTrainer, theirs, tokenizer, rows, tmp_path, **options),
        SFT_METRICS,
    )


def test_sft_sends_only_labelled_positions_through_the_head(model, tokenizer, examples, tmp_path: Path) -> None:
    trainer = sft_trainer(LeanSftTrainer, model, tokenizer, examples, tmp_path, per_device_train_batch_size=12)
    shapes = watch_head(model)
    trainer.train()
    labelled = sum(label != -100 for e in examples for label in e["labels"][1:])
    assert shapes == [torch.Size([labelled])]


def test_sft_evaluates(model, tokenizer, examples, tmp_path: Path) -> None:
    """What TRL asks the model for besides training still reaches it."""
    losses = []
    for trainer_class, own in ((LeanSftTrainer, model), (SFTTrainer, copy.deepcopy(model))):
        trainer = sft_trainer(trainer_class, own, tokenizer, examples, tmp_path)
        losses.append(trainer.evaluate(Dataset.from_list(examples))["eval_loss"])
    assert close(*losses)


# ------------------------------------------------------------------------------------------------------------------ DPO


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    """Eight pairs of different lengths, in TRL's conversational form."""
    questions = [
        "1+1?",
        "What is 12 plus 30?",
        "小明有3个苹果，又买了5个，现在有几个？",
        "Add 2 and 2, please, and say why.",
    ]
    answers = [("2", "It is three."), ("42", "4"), ("3 + 5 = 8, \\boxed{8}", "8"), ("4, as two and two are four", "5!")]
    speak = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return [
        {"prompt": speak("user", q * n), "chosen": speak("assistant", c), "rejected": speak("assistant", r * n)}
        for n in (1, 3)
        for q, (c, r) in zip(questions, answers, strict=True)
    ]


def dpo_trainer(
    trainer_class: type, model: Any, tokenizer: PreTrainedTokenizerFast, pairs: list, directory: Path, **options: Any
) -> Any:
    config = DPOConfig(
        output_dir=str(directory),
        beta=0.3,
        max_length=64,
        precompute_ref_log_probs=True,
        label_smoothing=0.1,  # exo_pair needs some
        **{**OPTIONS, "per_device_train_batch_size": 4, **options},
    )
    directory.mkdir(exist_ok=True)
    Dataset.from_list(pairs).save_to_disk(directory / "pairs")  # a cache of its own for each trainer's reference
    return trainer_class(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.load_from_disk(str(directory / "pairs")),
    )


Trainers = tuple[Any, Any]


@pytest.fixture(scope="module")
def dpo_trainers(loaded_model: Dots1ForCausalLM, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Trainers:
    """Ours and TRL's own, with every loss at hand; each test chooses one."""
    directory = tmp_path_factory.mktemp("dpo")
    pairs_of_words = [
        {
            "prompt": [{"role": "user", "content": "What is " + "one and " * n + "one?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n + 1}." * (1 + n % 2)}],
            "rejected": [{"role": "assistant", "content": "Who knows? " * (5 - n)}],
        }
        for n in range(5)
    ]
    theirs, ours = copy.deepcopy(loaded_model), copy.deepcopy(loaded_model)
    theirs.set_attn_implementation("sdpa")
    return (
        dpo_trainer(LeanDpoTrainer, ours, tokenizer, pairs_of_words, directory / "ours"),
        dpo_trainer(DPOTrainer, theirs, tokenizer, pairs_of_words, directory / "theirs"),
    )


def test_reference_logprobs_are_trls(dpo_trainers: Trainers) -> None:
    ours, theirs = (t.train_dataset for t in dpo_trainers)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert len(ours[column]) == len(theirs[column]) == 5
        assert all(close(a, b) for a, b in zip(ours[column], theirs[column], strict=True))


@pytest.mark.parametrize("loss_type", get_args(DpoLoss))
def test_every_dpo_loss_has_trls_value_gradients_and_metrics(loss_type: str, dpo_trainers: Trainers) -> None:
    losses, gradients, metrics = [], [], []
    for trainer in dpo_trainers:
        trainer.loss_types, trainer.loss_weights = [loss_type], [1.5]
        trainer.model.zero_grad(set_to_none=True)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
        # A reference that differs from the policy: no loss is at the point where all of them agree.
        batch["ref_chosen_logps"] = batch["ref_chosen_logps"] + torch.linspace(-2, 1, 5)
        batch["ref_rejected_logps"] = batch["ref_rejected_logps"] + torch.linspace(1.5, -1, 5)
        trainer._metrics["train"].clear()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        metrics.append({name: values[-1] for name, values in trainer._metrics["train"].items()})
        trainer._total_train_tokens = 0
    assert close(*losses)
    assert float(gradients[1].norm()) > 0
    assert float((gradients[0] - gradients[1]).norm()) <= TOLERANCE * float(gradients[1].norm())
    assert metrics[0].keys() == metrics[1].keys()
    assert {name: v for name, v in metrics[0].items() if not close(v, metrics[1][name])} == {}


def test_dpo_trains_as_trl_does(model, tokenizer, pairs, tmp_path: Path) -> None:
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("sdpa")
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "per_device_train_batch_size": 2}
    assert_same_history(
        dpo_trainer(LeanDpoTrainer, model, tokenizer, pairs, tmp_path / "ours", **options),
        dpo_trainer(DPOTrainer, theirs, tokenizer, pairs, tmp_path / "theirs", **options),
        DPO_METRICS,
    )


def test_dpo_of_an_adapter_refers_to_the_model_without_it(model, tokenizer, pairs, tmp_path: Path) -> None:
    trainers = []
    for trainer_class, name in ((LeanDpoTrainer, "ours"), (DPOTrainer, "theirs")):
        adapted = add_adapter(copy.deepcopy(model), LoraSection(r=4), "base")
        options = {"per_device_train_batch_size": 2}
        trainers.append(dpo_trainer(trainer_class, adapted, tokenizer, pairs, tmp_path / name, **options))
    assert_same_history(*trainers, DPO_METRICS)


def test_dpo_packs_its_batches(model, tokenizer, pairs, tmp_path: Path) -> None:
    trainer = dpo_trainer(LeanDpoTrainer, model, tokenizer, pairs, tmp_path, gradient_accumulation_steps=1)
    seen: list[torch.Size] = []
    model.model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    shapes = watch_head(model)
    trainer.train()
    rows = trainer.train_dataset
    answers = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    assert sum(shape[1] for shape in seen) == answers + 2 * sum(len(r["prompt_ids"]) for r in rows)
    assert all(shape[0] == 1 for shape in seen)
    assert sum(shape[0] for shape in shapes) == answers
