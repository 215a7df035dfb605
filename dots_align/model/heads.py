"""The value head of a critic: a dots1 whose language-model head gives one number for each state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VALUE_HEAD = "lm_head.weight"


def attach_value_head(model: Any) -> None:
    """Puts a value head, [1, hidden] without bias, where the language-model head was; of unspecified content.

    It keeps the language-model head's name, so that sharding, saving and loading treat it as they treat that one.
    """
    head = model.lm_head
    model.lm_head = nn.Linear(head.in_features, 1, bias=False, device=head.weight.device, dtype=head.weight.dtype)


def has_value_head(shape: tuple[int, ...]) -> bool:
    """Whether a stored language-model head of that shape is a value head."""
    return shape[0] == 1


def state_values(model: nn.Module, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """One forward of a critic.

    Args:
        inputs: keyword arguments of the model's forward, without labels. positions: [1, T] bool.

    Returns:
        [N] fp32, differentiable: the values of the states at `positions`, in order.
    """
    return model(**inputs).logits[..., 0][positions].float()
