"""CPU memory that is kept for tensors that come and go in every step.

malloc returns large blocks to the system when they are freed. Taking them anew costs a page fault every 4 KiB, which
for an activation or a weight gradient takes longer than to compute it, and several times as long on a virtual machine
that hands its free memory back to the host. On GPUs torch's own allocator keeps memory in the same way.
"""

from __future__ import annotations

import ctypes
import math
import weakref

import torch

SMALLEST = 2**20  # bytes; below, malloc is quick
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them in mallopt
_LARGEST = 32 * 2**20  # bytes: more mallopt does not take
_free: dict[int, list[torch.Tensor]] = {}


def keep_freed_memory() -> None:
    """Tells malloc to keep, from now on in this process, what is freed of blocks up to 32 MiB for those that come. So
    the process stays as large as it was at its largest. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, -1)  # the end of the heap, however much is free there
        mallopt(_MMAP_THRESHOLD, _LARGEST)


def kept_empty(shape: tuple[int, ...] | torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised, with the dtype and on the device of `like`.

    The memory of a large CPU tensor goes to the next one of as many bytes once the tensor and all views are gone. So
    there is never more of it than was in use at one time: this is for sizes that come again, not for those that depend
    on the data.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < SMALLEST:
        return like.new_empty(shape)
    blocks = _free.setdefault(size, [])
    try:
        block = blocks.pop()
    except IndexError:
        block = torch.empty(size, dtype=torch.uint8)
    # The tensor below owns `lent`, and nothing else does: that it goes tells that the tensor is gone.
    lent = (ctypes.c_char * size).from_address(block.data_ptr())
    weakref.finalize(lent, blocks.append, block).atexit = False
    return torch.frombuffer(lent, dtype=like.dtype).view(shape)
