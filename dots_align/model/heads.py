"""Heads of one row: a dots1 that says what a state is worth (a critic) or how good an answer is (a reward model).

In memory both are a `Dots1ForCausalLM` whose language-model head is a `ScalarHead`, so that sharding, adapters,
optimizer and files treat it as they treat that one. A reward model's files follow transformers' convention for
sequence classification (`score.weight`, one label), for which transformers has no dots1 class of its own: two lines
make one, and its backbone loads as it is.

    class Dots1ForSequenceClassification(GenericForSequenceClassification, Dots1PreTrainedModel): ...
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dots_align.model.packed import PackedBatch
from dots_align.model.sharded_io import SCORE_HEAD, VALUE_HEAD, save_weights
from dots_align.runtime import is_main_process

REWARD_MODEL = "Dots1ForSequenceClassification"
"""The architecture that a reward model's config.json names."""


class ScalarHead(nn.Linear):
    """[hidden] -> [1] in fp32 whatever the weight is stored in: two answers that differ little must not be rounded to
    one number.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(hidden.float(), self.weight.float())


def attach_scalar_head(model: Any) -> None:
    """Puts a head, [1, hidden] without bias, where the language-model head was; of unspecified content."""
    head = model.lm_head
    model.lm_head = ScalarHead(head.in_features, 1, bias=False, device=head.weight.device, dtype=head.weight.dtype)
    model.config.num_labels = 1


def has_scalar_head(model: Any) -> bool:
    """Whether a model, bare or under adapters, is a critic or a reward model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(base.lm_head, ScalarHead)


def is_scalar(shape: tuple[int, ...]) -> bool:
    """Whether a stored head of that shape gives one number."""
    return shape[0] == 1


def state_values(model: nn.Module, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """One forward of a critic.

    Args:
        inputs: keyword arguments of the model's forward, without labels. positions: [N] of its one row; one may come
        several times.

    Returns:
        [N] fp32, differentiable: the values of the states at `positions`, in order.
    """
    return model(**inputs).logits[0, :, 0].index_select(0, positions).float()


def sequence_scores(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """[S] fp32, differentiable: a reward model's score of each of the packed sequences, read at its last token."""
    last = batch.cu_seq_lens[1:].long() - 1
    return model(**batch.model_inputs(), logits_to_keep=last).logits[0, :, 0]


def save_reward_model(model: Any, directory: Path) -> None:
    """Writes weights and config of a full reward model into `directory`; collective where it is sharded."""
    save_weights(model, directory, stored_as={VALUE_HEAD: SCORE_HEAD})
    if is_main_process():
        config = copy.deepcopy(model.config)
        config.architectures = [REWARD_MODEL]
        config.save_pretrained(directory)
