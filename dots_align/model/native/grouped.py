"""Products of many fp32 matrices in one call of MKL, which torch brings along on x86.

One call gives each core matrices of its own. A call for each would divide every one over all cores and wait for the
last of them, which with a few hundred rows takes as long as the product.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dots_align.model.native import build

_PARTS, _FEWEST = 16, 128  # of all rows for each core; rows of a part
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # of CBLAS


@functools.cache
def _batch() -> Any:
    """`cblas_sgemm_batch` with 32-bit sizes, or None where torch's MKL has none."""
    if not torch.backends.mkl.is_available() or "ILP64" in torch.__config__.show():
        return None
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_sgemm_batch
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes, function.restype = (number, *[pointer] * 13, number, pointer), None
    return function


@dataclass(frozen=True)
class Matrices:
    """E fp32 matrices in memory: the first number of each [E], how many rows and columns each one has ([E] or one
    number for all), how far apart its rows (if `transposed`: its columns) lie.
    """

    starts: np.ndarray
    rows: Any
    columns: Any
    distance: int
    transposed: bool = False

    @staticmethod
    def blocks(rows: torch.Tensor, sizes: list[int]) -> Matrices | None:
        """Consecutive rows of one matrix [M, N]; `sizes` sum to M. None as in `of`."""
        distance = _distance(rows.stride(), rows.shape[1])
        if distance is None or not _readable(rows):
            return None
        counts = np.array(sizes, np.int64)
        return Matrices(rows.data_ptr() + 4 * distance * (counts.cumsum() - counts), counts, rows.shape[1], distance)

    @staticmethod
    def of(weight: torch.Tensor) -> Matrices | None:
        """Those of a tensor [E, M, N]; None where MKL cannot read them in place."""
        count, rows, columns = weight.shape
        transposed = weight.stride(2) != 1
        along = weight.stride()[:0:-1] if transposed else weight.stride()[1:]
        distance = _distance(along, rows if transposed else columns)
        if distance is None or not _readable(weight):
            return None
        starts = weight.data_ptr() + 4 * weight.stride(0) * np.arange(count)
        return Matrices(starts, rows, columns, distance, transposed)

    @property
    def turned(self) -> Matrices:
        return Matrices(self.starts, self.columns, self.rows, self.distance, not self.transposed)


def _distance(strides: tuple[int, ...], width: int) -> int | None:
    """Of rows of `width` numbers; None where their numbers are not side by side, or they overlap."""
    return strides[0] if strides[1] == 1 and strides[0] >= max(width, 1) else None


def _readable(tensor: torch.Tensor) -> bool:
    whole = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    switched_on = os.environ.get(build.SWITCH) != "0"
    return whole and tensor.dtype == torch.float32 and switched_on and _batch() is not None


def multiply(left: Matrices | None, right: Matrices | None, out: Matrices | None) -> bool:
    """out[e] = left[e] @ right[e] for every e; False, and nothing done, where one of the three is None.

    The outs are not transposed. Those whose left side has no columns stay as they are.
    """
    if left is None or right is None or out is None:
        return False
    count = len(out.starts)
    rows, columns, depth = (np.broadcast_to(n, count) for n in (out.rows, out.columns, left.columns))
    used = (rows > 0) & (columns > 0) & (depth > 0)
    number = int(used.sum())

    def each(values: Any, dtype: Any = np.int32) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(values, count)[used], dtype)

    arrays = [
        *(each(_TRANSPOSED if side.transposed else _PLAIN) for side in (left, right)),
        *(each(n) for n in (rows, columns, depth)),
        each(1, np.float32),
        *(part for side in (left, right) for part in (each(side.starts, np.int64), each(side.distance))),
        each(0, np.float32),
        each(out.starts, np.int64),
        each(out.distance),
        np.ones(number, np.int32),
    ]
    *arguments, sizes = (a.ctypes.data for a in arrays)
    if number:
        _batch()(_ROW_MAJOR, *arguments, number, sizes)
    return True


def multiply_rows(rows: torch.Tensor, sizes: list[int], weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Block e of `rows` [M, N] times `weight[e]` [N, N'] into that of `out` [M, N']; as `multiply`.

    Long blocks are cut, so that cores have about as much to do.
    """
    matrices, most = Matrices.of(weight), max(_FEWEST, sum(sizes) // (_PARTS * torch.get_num_threads()) + 1)
    if matrices is None:
        return False
    counts = np.array(sizes)
    cuts = np.maximum(-(-counts // most), 1)
    expert = np.repeat(np.arange(len(sizes)), cuts)
    number = np.arange(len(expert)) - np.repeat(cuts.cumsum() - cuts, cuts)
    pieces = ((number + 1) * counts[expert] // cuts[expert] - number * counts[expert] // cuts[expert]).tolist()
    blocks, results = Matrices.blocks(rows, pieces), Matrices.blocks(out, pieces)
    return multiply(blocks, replace(matrices, starts=matrices.starts[expert]), results)
