"""TRL's SFT, DPO and reward trainers over our forward: no padding in the model, no logits of tokens that have no label.

TRL keeps its losses, metrics and token counts. It asks the model for per-token log-probabilities with
`model(..., labels=labels, fused_lm_head=True)`; here that call is answered from packed sequences by
`model.logprobs.model_logprobs`. TRL's own answer reads the head's weight outside the head's forward, where a sharded
model has not gathered it, and on CPUs sends every padded position through the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from dots_align.model import attention
from dots_align.model.experts import local
from dots_align.model.heads import sequence_scores
from dots_align.model.logprobs import IGNORED, model_logprobs
from dots_align.model.packed import PackedBatch

# Attention implementations that compute packed sequences one by one; the others would pay for the square of the pack.
PACKING = (attention.IMPLEMENTATION, "flash_attention_2")


class LeanModel:
    """Stands where TRL calls the model: a call with `fused_lm_head=True` is answered leanly, any other passed on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = getattr(model, "module", model).config
        self.packs = config._attn_implementation in PACKING

    def __call__(
        self, *, labels: torch.Tensor | None = None, fused_lm_head: bool = False, **inputs: Any
    ) -> FusedCausalLMOutput | Any:
        if not fused_lm_head:
            return self.model(**inputs) if labels is None else self.model(labels=labels, **inputs)
        assert labels is not None
        labelled = labels[:, 1:] != IGNORED
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if self.packs and "attention_mask" in inputs:
            inputs, targets = unpadded(targets=targets, **inputs)
        scores = model_logprobs(self.model, inputs, targets, with_entropy=True, with_metrics=True)

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.new_zeros(labelled.shape).masked_scatter(labelled, values)

        return FusedCausalLMOutput(
            log_probs=spread(scores.logprobs),
            entropy=spread(scores.entropy),
            mean_logits=spread(scores.mean_logits),
            is_top1=spread(scores.is_top1),
            label_mask=labelled,
        )


def unpadded(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor, **others: Any
) -> tuple[dict[str, Any], torch.Tensor]:
    """A padded batch [B, T] as one packed row: the model's inputs, and the targets [1, N] of the N real tokens."""
    batch = packed_rows(input_ids, attention_mask)
    return {**others, **batch.model_inputs()}, targets[attention_mask.bool()][None]


def packed_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> PackedBatch:
    """A padded batch [B, T] without its padding."""
    real = attention_mask.bool()
    ends = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
    positions = attention_mask.cumsum(1) - 1
    return PackedBatch(input_ids[real][None], positions[real][None], ends)


def hash_local_parts(model: nn.Module) -> str:
    """SHA-256 of the weights, of sharded ones this process's part."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(local(tensor).contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


class LeanSftTrainer(SFTTrainer):
    """TRL's SFTTrainer on `LeanModel`. Batches come padded, or flattened to one row by `padding_free`."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        lean: Any = LeanModel(model)
        return super().compute_loss(lean, inputs, return_outputs, num_items_in_batch)


class LeanDpoTrainer(DPOTrainer):
    """TRL's DPOTrainer on `LeanModel`, for the policy and for the reference log-probs computed before training."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # TRL names its cache of reference log-probs by a hash of the weights, and cannot read those of a sharded model.
        with patched(dpo_trainer, "hash_module", hash_local_parts):
            super().__init__(*args, **options)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        lean: Any = LeanModel(model)
        return super().compute_loss(lean, inputs, return_outputs, num_items_in_batch)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(LeanModel(model), inputs)


class LeanScorer:
    """Stands where TRL calls a reward model: one score for each sequence of a padded batch, read at its last token."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = getattr(model, "module", model).config
        self.packs = config._attn_implementation in PACKING

    def __call__(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False
    ) -> SequenceClassifierOutput:
        if self.packs:
            scores = sequence_scores(self.model, packed_rows(input_ids, attention_mask))
        else:
            every = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).logits[..., 0]
            scores = every.gather(1, attention_mask.sum(1, keepdim=True) - 1)[:, 0]
        return SequenceClassifierOutput(logits=scores[:, None])  # pyright: ignore[reportArgumentType]


class LeanRewardTrainer(RewardTrainer):
    """TRL's RewardTrainer on `LeanScorer`."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        lean: Any = LeanScorer(model)
        return super().compute_loss(lean, inputs, return_outputs, num_items_in_batch)


@contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `module.name` is `value`."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)
