"""The value loss against its formula and verl's, however the batch is cut."""

from __future__ import annotations

import pytest
import torch
from verl.trainer.ppo import core_algos

from dots_align.objectives.value import ValueObjective, explained_variance

MASK = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0]])


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    now, old, returns = (torch.randn(MASK.shape, generator=generator) for _ in range(3))
    return now.requires_grad_(), old, returns


def test_half_the_larger_of_two_squared_errors() -> None:
    now, old, returns = tensors()
    loss, metrics = ValueObjective(0.2, 6)(now, old, returns, MASK)
    held = old + (now - old).clamp(-0.2, 0.2)
    wanted = 0.5 * (torch.maximum((now - returns) ** 2, (held - returns) ** 2) * MASK).sum() / 6
    torch.testing.assert_close(loss, wanted)
    clipped = ((held - returns) ** 2 > (now - returns) ** 2) & MASK.bool()
    assert metrics["value_clipfrac"] == pytest.approx(float(clipped.sum()) / 6)
    theirs, _ = core_algos.compute_value_loss(now, returns, old, MASK, 0.2)
    torch.testing.assert_close(theirs, loss)


def test_parts_sum_to_the_whole() -> None:
    now, old, returns = tensors()
    objective = ValueObjective(0.2, 6)
    parts = [objective(now[r], old[r], returns[r], MASK[r])[0] for r in ([0], [1, 2])]
    torch.testing.assert_close(sum(parts), objective(now, old, returns, MASK)[0])


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2, 9], [3, 9, 9], [0, 4, 9]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.zeros(3, 3), returns, mask) == pytest.approx(0)
    assert explained_variance(returns / 2, returns, mask) == pytest.approx(0.75)
    assert explained_variance(returns, torch.ones(3, 3), mask) == 0
