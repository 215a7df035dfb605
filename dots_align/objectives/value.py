"""The critic's objective: verl's clipped value loss."""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo import core_algos


class ValueObjective:
    """Loss of a micro-batch as its share of the batch, a mean over the batch's tokens.

    Args:
        cliprange_value: how far values may move from the old ones and still earn by it.
        batch_num_tokens: response tokens of the whole optimizer batch.
    """

    def __init__(self, cliprange_value: float, batch_num_tokens: int) -> None:
        self.cliprange_value, self.batch_num_tokens = cliprange_value, batch_num_tokens

    def __call__(
        self, values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """All tensors [B, T]; half the squared error, and `value`, `value_clipfrac` as means over tokens."""
        loss_of: Any = core_algos.compute_value_loss
        loss, clipped = loss_of(
            values,
            returns,
            old_values,
            mask,
            self.cliprange_value,
            "token-mean",
            batch_num_tokens=self.batch_num_tokens,
        )
        mean = (values.detach() * mask).sum() / mask.sum()
        return loss, {"value": float(mean), "value_clipfrac": float(clipped)}


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """Share of the returns' variance over tokens that the values foretell: 1 at best, 0 for a constant."""
    kept = mask.bool()
    variance = returns[kept].var()
    return float(1 - (returns - values)[kept].var() / variance) if variance > 0 else 0.0
