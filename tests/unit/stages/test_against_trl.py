"""One optimizer step of ours against one of TRL's GRPOTrainer, on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from dots_align.model.dots1 import load_base_model
from dots_align.stages.update import Batch
from dots_align.types import Trajectory
from tests.unit.stages.conftest import MAX_TOKENS, make_update, rl_recipe

LEARNING_RATE, CLIP_NORM, EPSILON = 1e-3, 0.5, 1e-4
ALGORITHMS = {
    "grpo": ({"name": "grpo", "clip_ratio_high": 0.28}, {"loss_type": "grpo", "epsilon_high": 0.28}),
    "dapo": ({"name": "dapo", "overlong_buffer": 0.0}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"name": "dr_grpo"}, {"loss_type": "dr_grpo", "epsilon_high": 0.2}),
    "kl": (
        {"name": "grpo", "kl_coef": 0.2},
        {"loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.2, "use_bias_correction_kl": False},
    ),
    "gspo": (
        {"name": "gspo", "clip_ratio_low": 0.02, "clip_ratio_high": 0.03},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
}


def padded(rows: list[Any], value: float, left: bool = False) -> torch.Tensor:
    tensors = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value, padding_side="left" if left else "right"
    )


def trl_step(trainer: GRPOTrainer, batch: Batch, sampled: list[Trajectory]) -> tuple[float, float]:
    """Loss and gradient norm of TRL's own training step on ready inputs, and the optimizer's step."""
    inputs = {
        "prompt_ids": padded([t.prompt_ids for t in sampled], 0, left=True),
        "prompt_mask": padded([[1] * len(t.prompt_ids) for t in sampled], 0, left=True),
        "completion_ids": padded([t.response_ids for t in sampled], 0),
        "completion_mask": padded([[1] * len(t.response_ids) for t in sampled], 0),
        "advantages": batch.advantages[:, 0],
        "old_per_token_logps": padded([batch.old[i] for i in range(len(sampled))], 0.0),
        "num_items_in_batch": batch.mask.sum(),
    }
    if batch.ref:
        inputs["ref_per_token_logps"] = padded([batch.ref[i] for i in range(len(sampled))], 0.0)
    trainer._prepare_inputs = lambda _: inputs  # pyright: ignore[reportAttributeAccessIssue] - in place of generation
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    loss = trainer.training_step(trainer.model, inputs, None)  # pyright: ignore[reportArgumentType]
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), CLIP_NORM)  # pyright: ignore
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    return float(loss), float(norm)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_is_trls(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, sampled: list[Trajectory], tmp_path: Path, name: str
) -> None:
    keys, theirs = ALGORITHMS[name]
    ours: Any = load_base_model(model_dir, "float32", "packed", "grouped")
    model: Any = load_base_model(model_dir, "float32", "sdpa", "grouped_mm")
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    optim = {"learning_rate": LEARNING_RATE, "adam_epsilon": EPSILON, "max_grad_norm": CLIP_NORM}
    optim["lr_scheduler_type"] = "constant"
    update = make_update(ours, rl_recipe(algorithm=keys, optim=optim, train={"micro_batch_tokens": 64}))
    # As after other updates: the policy has moved a little from where it sampled, and further from the reference.
    generator = torch.Generator().manual_seed(2)
    noisy = [
        {
            i: torch.tensor(t.rollout_logprobs) + s * torch.randn(len(t.response_ids), generator=generator)
            for i, t in enumerate(sampled)
        }
        for s in (0.2, 0.5)
    ]
    batch = Batch(sampled, 0, [0] * len(sampled), old=noisy[0], ref=noisy[1] if "kl_coef" in keys else {})
    update._advantages(batch, None)
    found = update._optimize(batch)
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(sampled),
        num_generations=4,
        max_completion_length=MAX_TOKENS,
        learning_rate=LEARNING_RATE,
        adam_epsilon=EPSILON,
        adam_beta2=0.95,
        weight_decay=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        report_to="none",
        **theirs,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(sampled)}),
        processing_class=tokenizer,
    )
    trainer.model.train()  # pyright: ignore[reportOptionalMemberAccess]
    loss, norm = trl_step(trainer, batch, sampled)
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)
    after = dict(trainer.model.named_parameters())  # pyright: ignore[reportOptionalMemberAccess]
    moved = max(float((after[n] - p).detach().abs().max()) for n, p in before.items())
    apart = max(float((after[n] - p).detach().abs().max()) for n, p in ours.named_parameters())
    assert moved > 1e-4
    assert apart < 1e-5
