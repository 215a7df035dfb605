"""How far training has moved each expert and its row of the router: a tensor of each checkpoint in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dots_align.model.merged_files import open_weights
from dots_align.model.sharded_io import HubFiles

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class WeightChange:
    """Each [layers, experts]. `experts` and `router`: the norm of the difference over that of the first checkpoint, of
    an expert's three matrices together and of its row of the router. `bias`: second minus first, of its routing bias.
    """

    experts: np.ndarray
    router: np.ndarray
    bias: np.ndarray


def weight_change(first: Path, second: Path, layers: Sequence[int], num_experts: int) -> WeightChange:
    """Compares the tensors of two checkpoints; adapters are folded into their bases.

    Raises:
        ValueError: a tensor is missing, or has another shape in one of them.
    """
    files = open_weights(first), open_weights(second)
    experts = np.zeros((len(layers), num_experts))
    router, bias = np.zeros_like(experts), np.zeros_like(experts)
    for row, layer in enumerate(layers):
        prefix = f"model.layers.{layer}.mlp"
        old, new = _pair(files, f"{prefix}.gate.weight")
        router[row] = ((new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-30)).numpy()
        old, new = _pair(files, f"{prefix}.gate.e_score_correction_bias")
        bias[row] = (new - old).numpy()
        for expert in range(num_experts):
            moved, size = 0.0, 0.0
            for projection in PROJECTIONS:
                old, new = _pair(files, f"{prefix}.experts.{expert}.{projection}.weight")
                moved, size = moved + float((new - old).square().sum()), size + float(old.square().sum())
            experts[row, expert] = (moved / max(size, 1e-30)) ** 0.5
    return WeightChange(experts, router, bias)


def _pair(files: tuple[HubFiles, HubFiles], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = files[0].shape(name)
    first, second = (one.read(name, shape, ()).double() for one in files)
    return first, second
