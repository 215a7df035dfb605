"""The native kernels as autograd functions: RMSNorm, SwiGLU, and attention with all between it and its projections.

They compute in fp32, on fp32 or bf16. What is kept for backward has the dtype of the inputs.
"""

# once_differentiable hides the names of backward's parameters:
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dots_align.model.native import build
from dots_align.model.packed import NO_PREFIX

_SOURCE = Path(__file__).parent / "kernels.cpp"
LANES = 16
UNIT_ROWS = 128  # as in kernels.cpp
DTYPES = (torch.float32, torch.bfloat16)

_Pointer, _Long, _Int, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _OpenMP(ctypes.Structure):
    _fields_ = (("parallel", _Pointer), ("threads", _Int))


class _Shape(ctypes.Structure):
    """Mirrors `AttentionShape`."""

    _fields_ = (
        *((name, _Pointer) for name in ("bounds", "offsets", "members")),
        *((name, _Int) for name in ("trees", "heads", "kv_heads", "dim", "rounded")),
        *((name, _Float) for name in ("scaling", "eps")),
    )


_INPUTS = ("q", "k", "v", "q_weight", "k_weight", "cosines", "sines", "out", "log_sums")
_ARRAYS = (*_INPUTS, "grad", "q_grad", "k_grad", "v_grad", "weight_grads")


class _Arrays(ctypes.Structure):
    """Mirrors `AttentionArrays`."""

    _fields_ = tuple((name, _Pointer) for name in _ARRAYS)


@functools.cache
def _functions(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = _Pointer, _Long
    for name, kinds in {
        "dots_attention": (pointer, pointer, pointer, _Int),
        "dots_norm": (pointer, pointer, number, number, _Float, _Int, _Int, pointer, pointer, pointer),
        "dots_norm_backward": (*[pointer] * 4, number, number, _Int, _Int, *[pointer] * 3),
        "dots_swiglu": (pointer, pointer, number, number, number, _Int, pointer, pointer),
        "dots_swiglu_backward": (*[pointer] * 3, number, number, number, _Int, *[pointer] * 3),
        "dots_collect": (*[pointer] * 3, number, number, number, _Int, pointer, pointer),
        "dots_collect_backward": (*[pointer] * 4, number, number, number, _Int, *[pointer] * 3),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = kinds, None
    return library


def _library() -> ctypes.CDLL:
    return _functions(build.load(_SOURCE, "training kernels"))


def available() -> bool:
    """Whether they can be used here; compiles them on the first call."""
    try:
        _library()
    except build.Unavailable:
        return False
    return True


def fits(*tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether the kernels can read them: whole tensors on a CPU, of one of the dtypes."""
    whole = all(type(x) in (torch.Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
    return whole and all(x.dtype in dtypes for x in tensors) and available()


def _openmp() -> Any:
    return ctypes.byref(_OpenMP(build.openmp()[0], torch.get_num_threads()))


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().contiguous()


def _is_bf16(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _units(rows: int) -> int:
    return -(-rows // UNIT_ROWS)


# ---------------------------------------------------------------------------------------------------------- RMSNorm


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, factors, width = x.contiguous(), _fp32(weight), x.shape[-1]
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        scales = factors.new_empty(x.numel() // width)
        shape = len(scales), width, eps, _is_bf16(x), _is_bf16(out)
        _library().dots_norm(x.data_ptr(), factors.data_ptr(), *shape, out.data_ptr(), scales.data_ptr(), _openmp())
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        grad, factors, width = grad.contiguous(), _fp32(weight), x.shape[-1]
        x_grad, weight_grads = torch.empty_like(x), factors.new_empty(_units(len(scales)), width)
        pointers = (t.data_ptr() for t in (grad, x, factors, scales))
        results = x_grad.data_ptr(), weight_grads.data_ptr()
        _library().dots_norm_backward(*pointers, len(scales), width, _is_bf16(x), _is_bf16(grad), *results, _openmp())
        return x_grad, weight_grads.sum(0).to(weight.dtype), None


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of the last dimension, a multiple of 16; as in transformers' dots1 rounded to the dtype of `x` before the
    weight is applied.

    Args:
        x: [..., width]. weight: [width].

    Returns:
        [..., width] in the wider of their dtypes
    """
    return _Norm.apply(x, weight, eps)


# ----------------------------------------------------------------------------------------------------------- SwiGLU


def can_gate(*tensors: torch.Tensor) -> bool:
    """Whether `gate` and `gate_backward` take them."""
    alike = all(x.shape[-1] % LANES == 0 and x.stride(-1) == 1 and x.dtype == tensors[0].dtype for x in tensors)
    return alike and fits(*tensors)


def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all [..., width], width a multiple of 16; rows equally far apart in both."""
    out = gate.new_empty(gate.shape)
    pointers = gate.data_ptr(), up.data_ptr()
    _library().dots_swiglu(*pointers, *_rows(gate), _is_bf16(gate), out.data_ptr(), _openmp())
    return out


def gate_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gate_grad: torch.Tensor, up_grad: torch.Tensor
) -> None:
    """Fills the gradients of the two, whose rows are as far apart as theirs; `grad` has no gaps."""
    pointers = (t.data_ptr() for t in (grad, gate, up))
    results = gate_grad.data_ptr(), up_grad.data_ptr()
    _library().dots_swiglu_backward(*pointers, *_rows(gate), _is_bf16(gate), *results, _openmp())


def _rows(matrix: torch.Tensor) -> tuple[int, int, int]:
    """How far apart, how many, how wide."""
    return matrix.stride(-2), matrix.numel() // matrix.shape[-1], matrix.shape[-1]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        of_gate, up = of_gate.contiguous(), up.contiguous()
        ctx.save_for_backward(of_gate, up)
        return gate(of_gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        of_gate, up = ctx.saved_tensors
        grads = torch.empty_like(of_gate), torch.empty_like(up)
        gate_backward(grad.contiguous(), of_gate, up, *grads)
        return grads


def swiglu(of_gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gate`, differentiable."""
    return _SwiGLU.apply(of_gate, up)


# ------------------------------------------------------------------------------------------- rows of tokens' choices


def can_collect(weights: torch.Tensor | None, *rows: torch.Tensor) -> bool:
    """Whether `collect` and `collect_backward` take them."""
    alike = all(x.shape[-1] % LANES == 0 and x.dtype == rows[0].dtype for x in rows)
    return alike and fits(*rows) and (weights is None or fits(weights, dtypes=(torch.float32,)))


def collect(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The sum of rows `places[j, t]` of x, over j in order, times `weights[t, j]` if there are any.

    Args:
        x: [M, width]. places: [K, T] int64. weights: [T, K] fp32.

    Returns:
        [T, width] fp32
    """
    (choices, tokens), width = places.shape, x.shape[1]
    x, weights = x.contiguous(), None if weights is None else weights.contiguous()
    out = x.new_empty(tokens, width, dtype=torch.float32)
    pointers = x.data_ptr(), places.data_ptr(), None if weights is None else weights.data_ptr()
    _library().dots_collect(*pointers, tokens, choices, width, _is_bf16(x), out.data_ptr(), _openmp())
    return out


def collect_backward(
    grad: torch.Tensor, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and the weights; each row of x is one token's."""
    (choices, tokens), width = places.shape, x.shape[1]
    grad, x, weights = grad.contiguous(), x.contiguous(), weights.contiguous()
    x_grad, weight_grads = torch.empty_like(x), torch.empty_like(weights)
    pointers = (t.data_ptr() for t in (grad, x, places, weights))
    results = x_grad.data_ptr(), weight_grads.data_ptr()
    _library().dots_collect_backward(*pointers, tokens, choices, width, _is_bf16(x), *results, _openmp())
    return x_grad, weight_grads


# -------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Trees:
    """Packed segments and which one continues which, as int64: `bounds` [segments + 1] in the batch, and of each tree
    (a segment and those that continue it) where it begins in `members`, `offsets` [trees + 1].
    """

    bounds: torch.Tensor
    offsets: torch.Tensor
    members: torch.Tensor

    @staticmethod
    def of(bounds: torch.Tensor, prefixes: torch.Tensor | None) -> Trees:
        count = len(bounds) - 1
        roots = torch.arange(count)
        if prefixes is not None:
            roots = torch.where(prefixes == NO_PREFIX, roots, prefixes)
        tree, members = roots.sort(stable=True)  # a continued segment comes before those that continue it
        sizes = tree.unique_consecutive(return_counts=True)[1]
        return Trees(bounds.long().contiguous(), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), members.contiguous())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        rotation: Sequence[torch.Tensor],
        trees: Trees,
        scaling: float,
        eps: float,
    ) -> torch.Tensor:
        tokens, dim = q.shape[0], len(q_weight)
        cosines, sines = (_fp32(x) for x in rotation)
        ctx.shape = trees, q.shape[1] // dim, k.shape[1] // dim, dim, q.dtype != torch.float32, scaling, eps
        inputs = *(_fp32(x) for x in (q, k, v, q_weight, k_weight)), cosines, sines
        out, log_sums = torch.empty_like(inputs[0]), cosines.new_empty(tokens, q.shape[1] // dim)
        _run(ctx.shape, (*inputs, out, log_sums), backward=False)
        out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, q_weight, k_weight, cosines, sines, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        trees, _, kv_heads, dim, *_ = ctx.shape
        inputs = [_fp32(x) for x in saved]
        grads = [torch.empty_like(x) for x in inputs[:3]]
        weight_grads = inputs[0].new_empty((len(trees.offsets) - 1) * kv_heads, 2, dim)
        _run(ctx.shape, (*inputs, _fp32(grad), *grads, weight_grads), backward=True)
        grads += weight_grads.sum(0).unbind()
        return *(g.to(x.dtype) for g, x in zip(grads, saved, strict=False)), None, None, None, None


def _run(shape: tuple[Any, ...], tensors: Sequence[torch.Tensor], backward: bool) -> None:
    trees, heads, kv_heads, dim, rounded, scaling, eps = shape
    arrays = _Arrays(**{name: t.data_ptr() for name, t in zip(_ARRAYS, tensors, strict=False)})
    of_trees = (t.data_ptr() for t in (trees.bounds, trees.offsets, trees.members))
    described = _Shape(*of_trees, len(trees.offsets) - 1, heads, kv_heads, dim, rounded, scaling, eps)
    _library().dots_attention(ctypes.byref(described), ctypes.byref(arrays), _openmp(), backward)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    trees: Trees,
    scaling: float,
    eps: float,
) -> torch.Tensor:
    """RMSNorm of each head's query and key, rotation by their positions, causal attention.

    Args:
        q: [N, heads * D], k, v: [N, kv_heads * D], the projections of packed tokens; D a multiple of 32.
        q_weight, k_weight: [D], of the norms. rotation: cosines and sines [N, D].
        trees: of the packed segments. scaling: factor of the scores. eps: of the norms.

    Returns:
        [N, heads * D] in the dtype of `v`
    """
    return _Attention.apply(q, k, v, q_weight, k_weight, rotation, trees, scaling, eps)
