"""The routed experts as grouped matrix products, plugged into transformers' experts interface.

Tokens are sorted by expert, so that each expert sees its rows as one block; an expert without rows is a block of zero
rows, nothing special. What is summed (a token's k results, its k gradients) is summed in the order of its chosen
experts, in fp32, by gathers instead of scatters: no number depends on the order in which anything ran.

Each step of the computation (gather, grouped product, SwiGLU, combine) is an autograd function of its own that keeps
only what its backward needs and computes only the gradients that are asked for.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import os
HUGE = float(os.environ.get('HUGE','4')) * 2**20
RB = int(os.environ.get('RB','4'))
HT = os.environ.get('HT')
IMPLEMENTATION = "dots_align_grouped"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------- grouped products


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers with rows that start at multiples of 16 bytes, which the GPU kernel wants."""
    step = 16 // matrix.element_size()
    if matrix.stride(-1) == 1 and matrix.stride(-2) % step == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    width = matrix.shape[-1]
    return F.pad(matrix, (0, -width % step))[..., :width]


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised CPU memory, in huge pages where it is large.

    What is large is given back to the system and asked for again in every step, and asking for it in pages of 4 KiB
    takes longer than the products that fill it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class _Kernel:
    """The three products of a grouped linear layer by torch's grouped kernel: on GPUs.

    Without a host synchronisation in bf16; torch 2.13 has no kernel for float32 and reads the counts back instead.
    """

    @staticmethod
    def forward(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        offsets = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(_aligned(rows), _aligned(weight.to(rows.dtype)).mT, offs=offsets)

    @staticmethod
    def rows_grad(grad: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        offsets = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(_aligned(grad), _aligned(weight.to(grad.dtype)), offs=offsets)

    @staticmethod
    def weight_grad(
        grad: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        offsets = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(_aligned(grad).mT, _aligned(rows), offs=offsets).to(weight.dtype)


class _Loop:
    """The same products by one matrix product per expert: on CPUs.

    oneDNN, which multiplies in bf16, compiles a kernel for every shape it meets and keeps a thousand of them; compiling
    takes longer than multiplying. So there the number of rows of a product is rounded up to one of 8 sizes between
    powers of two, by taking in rows of the next experts.
    """

    @staticmethod
    def blocks(rows: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """Each expert's rows; in bf16 followed by some of the next experts', except at the very end."""
        blocks = list(rows.split(sizes))
        if rows.element_size() == 2:
            start = 0
            for expert, size in enumerate(sizes):
                if size > 15:
                    step = 1 << (size.bit_length() - RB) if RB<9 else RB
                    end = start + (size + step - 1) // step * step
                    if end <= len(rows):
                        blocks[expert] = rows[start:end]
                start += size
        return blocks

    @staticmethod
    def multiply(rows: torch.Tensor, counts: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Block e of `rows` times `matrices[e]`."""
        out, sizes = (_empty(len(rows), matrices.shape[2],dtype=rows.dtype) if HT else rows.new_empty(len(rows), matrices.shape[2])), counts.tolist()
        each: Iterable[torch.Tensor] = matrices.unbind()
        if matrices.dtype != rows.dtype:  # one at a time: the copy stays in the cache
            each = (matrix.to(rows.dtype) for matrix in each)
        # In this order: what a block gives for rows of the next experts is overwritten by theirs.
        for block, matrix, result in zip(_Loop.blocks(rows, sizes), each, _Loop.blocks(out, sizes), strict=True):
            torch.mm(block, matrix, out=result)
        return out

    @staticmethod
    def forward(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Loop.multiply(rows, counts, weight.mT)

    @staticmethod
    def rows_grad(grad: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Loop.multiply(grad, counts, weight)

    @staticmethod
    def weight_grad(
        grad: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        out, sizes = _empty(*weight.shape, dtype=weight.dtype), counts.tolist()
        grads, blocks = list(grad.mT.split(sizes, dim=1)), _Loop.blocks(rows, sizes)
        for expert, size in enumerate(sizes):
            if (more := len(blocks[expert]) - size) > 0:
                grads[expert] = F.pad(grads[expert].mT, (0, 0, 0, more)).mT
        if out.dtype == rows.dtype:
            for block_grad, block, result in zip(grads, blocks, out.unbind(), strict=True):
                torch.mm(block_grad, block, out=result)
        else:
            for block_grad, block, result in zip(grads, blocks, out.unbind(), strict=True):
                result.copy_(block_grad @ block)
        return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products = _Kernel if rows.is_cuda else _Loop
        needs_rows, _, needs_weight = ctx.needs_input_grad
        ctx.products = products
        ctx.save_for_backward(rows if needs_weight else None, counts, weight)
        return products.forward(rows, counts, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        rows, counts, weight = ctx.saved_tensors
        grad = grad.contiguous()
        needs_rows, _, needs_weight = ctx.needs_input_grad
        rows_grad = ctx.products.rows_grad(grad, counts, weight) if needs_rows else None
        weight_grad = ctx.products.weight_grad(grad, rows, counts, weight) if needs_weight else None
        return rows_grad, None, weight_grad


def grouped_linear(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Block e of `rows` times `weight[e].T`, in the dtype of `rows`.

    Args:
        rows: [M, in], sorted by expert. counts: [E] rows of each expert, summing to M. weight: [E, out, in], of any
            floating dtype; its gradient has that dtype and is zero for experts without rows.

    Returns:
        [M, out]
    """
    return _GroupedLinear.apply(rows, counts, weight)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (hidden,) = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        out = torch.empty_like(hidden)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return out


def expert_mlp(
    rows: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    adapter: Any = None,
) -> torch.Tensor:
    """The SwiGLU experts on rows sorted by expert, in the dtype of the rows.

    Args:
        rows: [M, H]. counts: [E] int64 rows of each expert.
        gate_up: [E, 2I, H]. down: [E, H, I]. activation: of the gate, SiLU in dots1.
        adapter: `model.lora.ExpertAdapter` or None; adds its low-rank part to both products.

    Returns:
        [M, H]
    """
    hidden = grouped_linear(rows, counts, gate_up)
    if adapter is not None:
        hidden = hidden + adapter.delta("gate_up_proj", rows, counts)
    if isinstance(activation, nn.SiLU):
        middle = _SwiGLU.apply(hidden)
    else:
        gate, up = hidden.chunk(2, dim=-1)
        middle = activation(gate) * up
    out = grouped_linear(middle, counts, down)
    return out if adapter is None else out + adapter.delta("down_proj", middle, counts)


# ------------------------------------------------------------------------------------- tokens to rows, rows to tokens


class _Routing:
    """Which row, in the order of experts, holds which of a token's k choices.

    `token` [M] the token of each row; `rows` [k, T] the row of each token's j-th choice; `counts` [E] rows of each
    expert. M = T * k. No host synchronisation.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        num_tokens, k = top_k_index.shape
        ids, order = top_k_index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True)
        self.counts = ends.diff(prepend=ends.new_zeros(1))
        self.token = order // k
        position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        self.rows = position.view(num_tokens, k).t().contiguous()
        self.order = order


class _Gather(torch.autograd.Function):
    """hidden [T, H] -> rows [M, H]"""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, routing: _Routing, dtype: torch.dtype) -> torch.Tensor:
        ctx.routing, ctx.dtype = routing, hidden.dtype
        return hidden.to(dtype).index_select(0, routing.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        first, *others = ctx.routing.rows
        total = grad.index_select(0, first).to(torch.promote_types(grad.dtype, torch.float32))
        for rows in others:
            total += grad.index_select(0, rows)
        return total.to(ctx.dtype), None, None


class _Combine(torch.autograd.Function):
    """rows [M, H], weights [T, k] -> each token's weighted sum [T, H] in `dtype`"""

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, weights: torch.Tensor, routing: _Routing, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.routing, ctx.dtype = routing, out.dtype
        ctx.save_for_backward(out if ctx.needs_input_grad[1] else None, weights)
        wide = torch.promote_types(weights.dtype, torch.float32)
        total = torch.zeros(len(weights), out.shape[1], dtype=wide, device=out.device)
        for rows, weight in zip(routing.rows, weights.t(), strict=True):
            total.addcmul_(out.index_select(0, rows).to(wide), weight.unsqueeze(-1))
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        out, weights = ctx.saved_tensors
        routing = ctx.routing
        needs_out, needs_weights, _, _ = ctx.needs_input_grad
        wide = torch.promote_types(weights.dtype, torch.float32)
        row_weights = weights.reshape(-1)[routing.order].unsqueeze(-1)
        num_rows = len(routing.token)
        out_grad = grad.new_empty(num_rows, grad.shape[1], dtype=ctx.dtype) if needs_out else None
        dots = weights.new_empty(num_rows, dtype=wide) if needs_weights else None
        chunk = 1024 if not grad.is_cuda else 16384
        for start in range(0, num_rows, chunk):
            part = slice(start, start + chunk)
            row_grad = grad.index_select(0, routing.token[part]).to(wide)
            if dots is not None:
                torch.sum(row_grad * out[part], -1, out=dots[part])
            if out_grad is not None:
                out_grad[part] = row_grad.mul_(row_weights[part])
        weights_grad = dots[routing.rows.t()].to(weights.dtype) if dots is not None else None
        return out_grad, weights_grad, None, None


# ------------------------------------------------------------------------------------------------------- the plug


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
    gate_up, down = local(experts.gate_up_proj), local(experts.down_proj)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up.dtype
    routing = _Routing(top_k_index, experts.num_experts)
    rows, counts = _Gather.apply(hidden_states, routing, dtype), routing.counts
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
    combined = _Combine.apply(out, top_k_weights, routing, hidden_states.dtype)
    return combined if meanwhile is None else (combined, aside)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward
