"""The routed experts as grouped matrix products, plugged into transformers' experts interface.

Tokens are sorted by expert, so that each expert sees its rows as one block; an expert without rows is a block of zero
rows, nothing special. What is summed (a token's k results, its k gradients) is summed in the order of its chosen
experts, in fp32, by gathers instead of scatters: no number depends on the order in which anything ran.

Every step (gather, grouped product, SwiGLU, combine) is an autograd function of its own, which keeps only what its
backward needs and computes only the gradients that are asked for.
"""

# once_differentiable hides the names of backward's parameters:
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dots_align.model.kept_memory import kept_empty
from dots_align.model.native import kernels
from dots_align.model.native.grouped import Matrices, multiply, multiply_rows

IMPLEMENTATION = "dots_align_grouped"
# Multiplications that a CPU core could do in bf16 in the time that oneDNN takes to begin a product: 15 microseconds.
_BEGINNING = 1_500_000
SILU = (nn.SiLU, SiLUActivation)
_SMALL = 2**16  # numbers in a matrix; where they are larger, reading them is what takes the time


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------- grouped products


class _Kernel:
    """The three products of a grouped linear layer by torch's grouped kernel: on GPUs.

    In bf16 nothing is read back to the host; for fp32 torch 2.13 has no kernel and reads the counts back once a
    product, to loop over the experts.
    """

    @staticmethod
    def forward(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len(rows) == 0:
            return rows.new_empty(0, weight.shape[1])
        return F.grouped_mm(_aligned(rows), _aligned(weight.to(rows.dtype)).mT, offs=_ends(counts))

    @staticmethod
    def rows_grad(grad: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len(grad) == 0:
            return grad.new_empty(0, weight.shape[2])
        return F.grouped_mm(_aligned(grad), _aligned(weight.to(grad.dtype)), offs=_ends(counts))

    @staticmethod
    def weight_grad(grad: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len(grad) == 0:
            return torch.zeros_like(weight)
        # The transposed left and plain right side is the one layout in which the kernel takes experts without rows.
        return F.grouped_mm(_aligned(grad).mT, _aligned(rows), offs=_ends(counts)).to(weight.dtype)


def _ends(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows that start at multiples of 16 bytes, as the kernel demands."""
    step = 16 // matrix.element_size()
    if matrix.stride(-1) == 1 and matrix.stride(-2) % step == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    width = matrix.shape[-1]
    return F.pad(matrix, (0, -width % step))[..., :width]


class _Loop:
    """The same products by one matrix product per expert: on CPUs. In fp32 one call of MKL computes them; not
    weights' gradients, which cannot be cut, where an expert has so many rows that its core would be the last by far.

    oneDNN, which multiplies in bf16, compiles a kernel for every shape it meets, which takes longer than to multiply,
    and keeps a thousand of them. So there the number of rows of a product is rounded up to one of 8 sizes between
    powers of two, by taking in some rows of the next experts. It also takes its time to begin, so where products are
    small one batched product computes them all, if experts have about as many rows.
    """

    @staticmethod
    def forward(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Loop._multiply(rows, counts, weight.mT)

    @staticmethod
    def rows_grad(grad: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Loop._multiply(grad, counts, weight)

    @staticmethod
    def weight_grad(grad: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out, sizes = kept_empty(weight.shape, weight), counts.tolist()
        if batch := _Batch.of(counts, sizes, rows, weight):
            return out.copy_(torch.bmm(batch.padded(grad).mT, batch.padded(rows)))
        if _even(sizes):
            blocks, grads = Matrices.blocks(rows, sizes), Matrices.blocks(grad, sizes)
            if multiply(grads and grads.turned, blocks, Matrices.of(out)):
                for expert, size in enumerate(sizes):
                    if size == 0:
                        out[expert] = 0
                return out
        grads = list(grad.mT.split(sizes, dim=1))
        blocks, rounded = _Loop._blocks(rows, sizes)
        for expert in rounded:  # what was taken in counts nothing here
            taken_in = blocks[expert].shape[0] - sizes[expert]
            grads[expert] = F.pad(grads[expert].mT, (0, 0, 0, taken_in)).mT
        if out.dtype == rows.dtype:
            for block_grad, block, result in zip(grads, blocks, out.unbind(), strict=True):
                torch.mm(block_grad, block, out=result)
        else:
            for block_grad, block, result in zip(grads, blocks, out.unbind(), strict=True):
                result.copy_(torch.mm(block_grad, block))
        return out

    @staticmethod
    def _multiply(rows: torch.Tensor, counts: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Block e of `rows` times `matrices[e]`."""
        sizes = counts.tolist()
        if batch := _Batch.of(counts, sizes, rows, matrices):
            return batch.unpadded(torch.bmm(batch.padded(rows), matrices.to(rows.dtype)))
        out = rows.new_empty(len(rows), matrices.shape[2])
        if multiply_rows(rows, sizes, matrices, out):
            return out
        blocks, _ = _Loop._blocks(rows, sizes)
        results, _ = _Loop._blocks(out, sizes)
        each: Iterable[torch.Tensor] = matrices.unbind()
        if matrices.dtype != rows.dtype:  # one by one, so that the copy is still in the cache when it is used
            each = (matrix.to(rows.dtype) for matrix in each)
        # In this order: what a product gives for rows of the next experts is overwritten by theirs.
        for block, matrix, result in zip(blocks, each, results, strict=True):
            torch.mm(block, matrix, out=result)
        return out

    @staticmethod
    def _blocks(rows: torch.Tensor, sizes: list[int]) -> tuple[list[torch.Tensor], list[int]]:
        """Each expert's rows, and the experts whose number was rounded up (as far as there are rows)."""
        blocks, rounded, start = list(rows.split(sizes)), [], 0
        if rows.element_size() == 2:
            for expert, size in enumerate(sizes):
                end = start + _rounded_up(size)
                if end > start + size:
                    blocks[expert] = rows[start:end]
                    rounded.append(expert)
                start += size
        return blocks, rounded


def _even(sizes: list[int]) -> bool:
    """Whether cores that take whole experts are done at about the same time."""
    return max(sizes) * torch.get_num_threads() <= 1.5 * sum(sizes)


def _rounded_up(size: int) -> int:
    """To one of 8 sizes between powers of two."""
    step = 1 << max(size.bit_length() - 4, 0)
    return (size + step - 1) // step * step


@dataclass(frozen=True)
class _Batch:
    """Every expert's rows padded to `width`; of all these, row i is number `slots[i]`."""

    num_experts: int
    width: int
    slots: torch.Tensor

    @staticmethod
    def of(counts: torch.Tensor, sizes: list[int], rows: torch.Tensor, weight: torch.Tensor) -> _Batch | None:
        """None where products one by one are faster. `sizes` are those of `counts`."""
        if rows.element_size() > 2 or weight[0].numel() > _SMALL:  # products in fp32 begin at once
            return None
        num_experts, width = len(sizes), _rounded_up(max(sizes))
        if (num_experts * width - len(rows)) * weight[0].numel() > num_experts * _BEGINNING:
            return None
        shifts = torch.arange(num_experts) * width - (counts.cumsum(0) - counts)
        slots = torch.arange(len(rows)) + torch.repeat_interleave(shifts, counts, output_size=len(rows))
        return _Batch(num_experts, width, slots)

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """[M, N] -> [E, width, N], zero where there is no row."""
        batch = rows.new_zeros(self.num_experts * self.width, rows.shape[1])
        return batch.index_copy_(0, self.slots, rows).unflatten(0, (self.num_experts, self.width))

    def unpadded(self, batch: torch.Tensor) -> torch.Tensor:
        """[E, width, N] -> [M, N]"""
        return batch.flatten(0, 1).index_select(0, self.slots)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.products = _Loop if rows.device.type == "cpu" else _Kernel
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, counts, weight)
        return ctx.products.forward(rows, counts, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        rows, counts, weight = ctx.saved_tensors
        grad = grad.contiguous()  # .sum() expands its gradient
        needs_rows_grad, _, needs_weight_grad = ctx.needs_input_grad
        rows_grad = ctx.products.rows_grad(grad, counts, weight) if needs_rows_grad else None
        weight_grad = ctx.products.weight_grad(grad, rows, counts, weight) if needs_weight_grad else None
        return rows_grad, None, weight_grad


def grouped_linear(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Block e of `rows` times `weight[e].T`, in the dtype of `rows`.

    Args:
        rows: [M, in], sorted by expert. counts: [E] rows of each expert, summing to M. weight: [E, out, in], of any
            floating dtype; its gradient has the same, and is zero for an expert without rows.

    Returns:
        [M, out]
    """
    return _GroupedLinear.apply(rows, counts, weight)


# ------------------------------------------------------------------------------------------------------ the experts


class _SwiGLU(torch.autograd.Function):
    """hidden [M, 2I] = (gate, up) -> silu(gate) * up [M, I]"""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return kernels.gate(gate, up) if kernels.can_gate(gate, up) else F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (hidden,) = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        hidden_grad = torch.empty_like(hidden)
        gate_grad, up_grad = hidden_grad.chunk(2, dim=-1)
        if kernels.can_gate(gate, up):
            kernels.gate_backward(grad.contiguous(), gate, up, gate_grad, up_grad)
            return hidden_grad
        torch.mul(F.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return hidden_grad


def expert_mlp(
    rows: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    adapter: Any = None,
) -> torch.Tensor:
    """The gated experts on rows sorted by expert, in the dtype of the rows.

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
    if isinstance(activation, SILU):
        middle = _SwiGLU.apply(hidden)
    else:
        gate, up = hidden.chunk(2, dim=-1)
        middle = activation(gate) * up
    out = grouped_linear(middle, counts, down)
    return out if adapter is None else out + adapter.delta("down_proj", middle, counts)


def active_adapter(experts: nn.Module) -> Any:
    """The routed experts' LoRA adapter, unless there is none or PEFT has switched adapters off."""
    adapter = getattr(experts, "lora", None)
    return None if adapter is None or adapter.disable_adapters else adapter


# ------------------------------------------------------------------------------------- tokens to rows, rows to tokens


def _sort_by_expert(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the experts [T, K] that the tokens chose: `order` [M = T * K], the flat choice that each row serves;
    `places` [K, T], the row that serves each token's j-th choice; `counts` [E]. Nothing is read back to the host.
    """
    num_tokens, k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(num_experts, dtype=ids.dtype, device=ids.device), right=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, places.view(num_tokens, k).t().contiguous(), ends.diff(prepend=ends.new_zeros(1))


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype for their sums: at least fp32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _Gather(torch.autograd.Function):
    """hidden [T, H] -> rows [M, H] in `dtype`: row i is that of token `order[i] // K`"""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, order: torch.Tensor, places: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(places)
        hidden = hidden.to(dtype)
        rows = hidden.new_empty(len(order), hidden.shape[1])
        return torch.index_select(hidden, 0, order // len(places), out=rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        if kernels.can_collect(None, grad):
            return kernels.collect(grad, places, None).to(ctx.dtype), None, None, None
        total = torch.zeros(places.shape[1], grad.shape[1], dtype=_wide(grad), device=grad.device)
        for rows in places:
            total += grad.index_select(0, rows)
        return total.to(ctx.dtype), None, None, None


class _Combine(torch.autograd.Function):
    """out [M, H], weights [T, K] -> the weighted sum of each token's K rows [T, H] in `dtype`"""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        weights: torch.Tensor,
        order: torch.Tensor,
        places: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.out_dtype = out.dtype
        ctx.save_for_backward(out if ctx.needs_input_grad[1] else None, weights, order, places)
        if kernels.can_collect(weights, out):
            return kernels.collect(out, places, weights).to(dtype)
        total = torch.zeros(len(weights), out.shape[1], dtype=_wide(out, weights), device=out.device)
        for rows, weight in zip(places, weights.t(), strict=True):
            total.addcmul_(out.index_select(0, rows).to(total.dtype), weight.unsqueeze(-1))
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        out, weights, order, places = ctx.saved_tensors
        if out is not None and kernels.can_collect(weights, out, grad):
            out_grad, weights_grad = kernels.collect_backward(grad, out, places, weights)
            return out_grad if ctx.needs_input_grad[0] else None, weights_grad, None, None, None
        num_rows, wide = len(order), _wide(grad, weights)
        row_tokens, row_weights = order // len(places), weights.reshape(-1)[order].unsqueeze(-1)
        out_grad = None
        if ctx.needs_input_grad[0]:
            out_grad = grad.new_empty(num_rows, grad.shape[1], dtype=ctx.out_dtype)
        dots = grad.new_empty(num_rows, dtype=wide)
        # Piece by piece: the wide copies of a piece stay in a CPU's cache, and are small beside a GPU's memory.
        piece = 1024 if grad.device.type == "cpu" else 16384
        for start in range(0, num_rows, piece):
            part = slice(start, start + piece)
            row_grad = grad.index_select(0, row_tokens[part]).to(wide)
            if out is not None:
                torch.sum(row_grad * out[part], -1, out=dots[part])
            if out_grad is not None:
                torch.mul(row_grad, row_weights[part], out=out_grad[part])
        weights_grad = None if out is None else dots[places.t()].to(weights.dtype)
        return out_grad, weights_grad, None, None, None


def experts_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    meanwhile: Callable[[], torch.Tensor] | None = None,
) -> Any:
    """`Dots1NaiveMoe.forward` by grouped products, in the dtype of autocast where that is on, else of the weights.

    Args:
        hidden_states: [T, H]. top_k_index: [T, K] expert ids. top_k_weights: [T, K] fp32.
        meanwhile: other work to do while tokens travel to their experts; its result is returned beside the output.

    Returns:
        [T, H] in the dtype of `hidden_states`; with `meanwhile` the pair of that and its result.
    """
    gate_up, down = local(experts.gate_up_proj), local(experts.down_proj)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up.dtype
    order, places, counts = _sort_by_expert(top_k_index, experts.num_experts)
    rows = _Gather.apply(hidden_states, order, places, dtype)
    exchange = getattr(experts, "exchange", None)
    travelling = None if exchange is None else exchange.dispatch(rows, counts)
    aside = None if meanwhile is None else meanwhile()
    if travelling is not None:
        rows, counts = travelling.wait()
    out = expert_mlp(rows, counts, gate_up, down, experts.act_fn, active_adapter(experts))
    if travelling is not None:
        out = travelling.combine(out)
    combined = _Combine.apply(out, top_k_weights, order, places, hidden_states.dtype)
    return combined if meanwhile is None else (combined, aside)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward
