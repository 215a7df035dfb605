"""Watching the router: which experts tokens chose, how evenly, and whether two forwards agree.

Everything is read with hooks on transformers' own modules (`mlp.gate` gives logits, `mlp.experts` receives the
chosen ids), so what is reported is what was computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


def moe_layers(model: nn.Module) -> list[tuple[int, Any]]:
    """(layer index, MoE block) of every layer that routes, in order. Works on the bare model and under adapters."""
    return [
        (int(name.rsplit("layers.", 1)[1].split(".")[0]), module)
        for name, module in model.named_modules()
        if hasattr(module, "experts") and hasattr(module, "gate") and "layers." in name
    ]


@dataclass
class RecordedRoutes:
    """Routes of the forwards inside `record_routes`: per forward one [tokens, layers, k] uint8 tensor of expert ids.

    `gaps` (fp32 [tokens, layers], only if asked for) is the distance in choice score (sigmoid + correction bias)
    between the last chosen and the first rejected expert: a tiny gap is a near-tie that rounding may flip.
    """

    routes: list[torch.Tensor] = field(default_factory=list)
    gaps: list[torch.Tensor] = field(default_factory=list)

    def take(self) -> torch.Tensor:
        """The routes of the one forward since the last call."""
        (routes,) = self.routes
        self.routes.clear()
        return routes


@contextmanager
def record_routes(model: nn.Module, with_gaps: bool = False) -> Iterator[RecordedRoutes]:
    """Records the expert ids chosen by every token of every forward made inside the context."""
    layers = moe_layers(model)
    recorded = RecordedRoutes()
    pending: list[torch.Tensor] = []
    pending_gaps: list[torch.Tensor] = []
    handles = []

    def on_experts(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        pending.append(arguments[1].detach().to(torch.uint8))
        if len(pending) == len(layers):
            recorded.routes.append(torch.stack(pending, dim=1))
            pending.clear()
            if with_gaps:
                recorded.gaps.append(torch.stack(pending_gaps, dim=1))
                pending_gaps.clear()

    def on_gate(module: Any, _arguments: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
        choice = logits.detach().sigmoid() + module.e_score_correction_bias
        best = choice.topk(module.config.num_experts_per_tok + 1, dim=-1).values
        pending_gaps.append(best[:, -2] - best[:, -1])

    for _, block in layers:
        handles.append(block.experts.register_forward_pre_hook(on_experts))
        if with_gaps:
            handles.append(block.gate.register_forward_hook(on_gate))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class RouteFlips:
    """Where two forwards of one sequence chose different experts.

    `affected` [n] bool: positions at or after a token that went another way (its state differs, and later tokens
    attend to it). `num_roots` and `root_gap`: flips in the lowest layer that has any, which no other flip can have
    caused, and the largest score gap among them; a gap of about 1e-7 is rounding at a tie, a large one is a bug.
    """

    affected: torch.Tensor
    num_roots: int
    root_gap: float


def find_flips(routes: torch.Tensor, gaps: torch.Tensor, other: bytes) -> RouteFlips:
    """Compares routes [n, layers, k] (with their score gaps [n, layers]) to those recorded as `Sample.routes`."""
    theirs = torch.frombuffer(bytearray(other), dtype=torch.uint8).view(-1, *routes.shape[1:]).to(routes.device)
    differ = (routes[: len(theirs)].sort(-1).values != theirs.sort(-1).values).any(-1)  # [n, layers]
    affected = differ.any(-1).cumsum(0) > 0
    layers = differ.any(0).nonzero().squeeze(-1)
    if len(layers) == 0:
        return RouteFlips(affected, 0, 0.0)
    roots = differ[:, layers[0]]
    return RouteFlips(affected, int(roots.sum()), float(gaps[: len(theirs), layers[0]][roots].max()))


class LoadMonitor:
    """Counts how many routed slots each expert got, over the forwards that train (gradients enabled)."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [index for index, _ in moe_layers(model)]
        self._counts: dict[int, torch.Tensor] = {}
        for index, block in moe_layers(model):
            block.experts.register_forward_pre_hook(self._hook(index, block.config.n_routed_experts))

    def _hook(self, index: int, num_experts: int):
        def count(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                counts = torch.bincount(arguments[1].detach().flatten(), minlength=num_experts)
                self._counts[index] = self._counts.get(index, 0) + counts

        return count

    def take(self) -> list[list[float]] | None:
        """Share of routed slots of each expert, a row per MoE layer summing to 1, since the last call; None if none
        trained.
        """
        if not self._counts:
            return None
        loads = [(self._counts[i].double() / self._counts[i].sum()).tolist() for i in self.layers]
        self._counts.clear()
        return loads


def load_metrics(load: list[list[float]]) -> dict[str, float]:
    """`max_violation` (largest expert load over the mean, minus 1, worst layer) and `entropy` (1 = even, mean over
    layers).
    """
    rows = torch.tensor(load, dtype=torch.float64)
    violation = (rows.max(dim=-1).values * rows.shape[-1] - 1).max()
    entropy = -(rows * rows.clamp(min=1e-12).log()).sum(-1) / torch.log(torch.tensor(float(rows.shape[-1])))
    return {"max_violation": float(violation), "entropy": float(entropy.mean())}
