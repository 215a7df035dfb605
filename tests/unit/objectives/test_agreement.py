"""What the logs say about the difference between trainer and rollout."""

from __future__ import annotations

import pytest
import torch

from dots_align.objectives.agreement import Agreement


def test_clean_and_flipped_tokens_are_told_apart() -> None:
    agreement = Agreement()
    agreement.add(torch.tensor([1.0, 3.0, 90.0]), torch.tensor([False, False, True]), 2, 0.01)
    agreement.add(torch.tensor([2.0, 6.0, 70.0]), torch.tensor([False, False, True]), 1, 0.005)
    assert agreement.metrics() == pytest.approx(
        {
            "max": 6.0,
            "mean": 3.0,
            "median": 2.0,  # torch's: the lower of the two in the middle
            "flips": 3.0,
            "flip_gap": 0.01,
            "flipped_tokens": 2.0,
            "flipped_max": 90.0,
        }
    )


def test_nothing_flipped_nothing_clean_and_nothing_at_all() -> None:
    none = {"flips": 0.0, "flip_gap": 0.0, "flipped_tokens": 0.0, "flipped_max": 0.0}
    assert Agreement().metrics() == none
    clean = Agreement()
    clean.add(torch.tensor([0.5]), torch.tensor([False]), 0, 0.0)
    assert clean.metrics() == {**none, "max": 0.5, "mean": 0.5, "median": 0.5}
    flipped = Agreement()
    flipped.add(torch.tensor([0.5]), torch.tensor([True]), 1, 0.25)
    assert flipped.metrics() == {"flips": 1.0, "flip_gap": 0.25, "flipped_tokens": 1.0, "flipped_max": 0.5}
