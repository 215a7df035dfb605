"""The routed experts as grouped matrix products, plugged into transformers' experts interface.

Tokens are sorted by expert, so that each expert sees its rows as one block; an expert without rows is a block of zero
rows, nothing special. The combine adds a token's k results in the order of its chosen experts, in fp32, with a gather
and a sum instead of a scatter: the result does not depend on the order in which anything ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "dots_align_grouped"


class Projections(Protocol):
    """The two grouped products of the experts; an adapter offers the same with its low-rank part added."""

    def gate_up(self, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def down(self, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def grouped_linear(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Block e of `rows` times `weight[e].T`.

    Args:
        rows: [M, in], sorted by expert. counts: [E] rows of each expert, summing to M. weight: [E, out, in].

    Returns:
        [M, out]
    """
    offsets = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)


def expert_mlp(
    rows: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    adapter: Any = None,
) -> torch.Tensor:
    """The SwiGLU experts on rows sorted by expert.

    Args:
        rows: [M, H] in the dtype of the weights. counts: [E] int64 rows of each expert.
        gate_up: [E, 2I, H]. down: [E, H, I]. activation: of the gate, SiLU in dots1.
        adapter: `model.lora.ExpertAdapter` or None; adds its low-rank part to both products.

    Returns:
        [M, H]
    """
    hidden = grouped_linear(rows, counts, gate_up)
    if adapter is not None:
        hidden = hidden + adapter.delta("gate_up_proj", rows, counts)
    gate, up = hidden.chunk(2, dim=-1)
    middle = activation(gate) * up
    out = grouped_linear(middle, counts, down)
    return out if adapter is None else out + adapter.delta("down_proj", middle, counts)


def active_adapter(experts: nn.Module) -> Any:
    """The routed experts' LoRA adapter, unless there is none or PEFT has switched adapters off."""
    adapter = getattr(experts, "lora", None)
    return None if adapter is None or adapter.disable_adapters else adapter


def experts_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    meanwhile: Callable[[], torch.Tensor] | None = None,
) -> Any:
    """`Dots1NaiveMoe.forward` by grouped products.

    Args:
        hidden_states: [T, H]. top_k_index: [T, K] expert ids. top_k_weights: [T, K] fp32.
        meanwhile: other work to do while tokens travel to their experts; its result is returned beside the output.

    Returns:
        [T, H] in the dtype of `hidden_states`; with `meanwhile` the pair of that and its result.
    """
    num_tokens, k = top_k_index.shape
    gate_up, down = local(experts.gate_up_proj), local(experts.down_proj)
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts.num_experts)
    rows = hidden_states.to(gate_up.dtype)[order // k]
    exchange = getattr(experts, "exchange", None)
    aside = None
    if exchange is None:
        if meanwhile is not None:
            aside = meanwhile()
        out = expert_mlp(rows, counts, gate_up, down, experts.act_fn, active_adapter(experts))
    else:
        travelling = exchange.dispatch(rows, counts)
        if meanwhile is not None:
            aside = meanwhile()
        rows, counts = travelling.wait()
        out = expert_mlp(rows, counts, gate_up, down, experts.act_fn, active_adapter(experts))
        out = travelling.combine(out)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    combined = (out[position].view(num_tokens, k, -1) * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)
    return combined if meanwhile is None else (combined, aside)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward
