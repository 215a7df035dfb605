"""Memory of large tensors is used again once they are gone, and never before."""

from __future__ import annotations

import gc
import resource
import sys
import threading

import pytest
import torch
from torch import nn

from dots_align.model.experts import grouped_linear
from dots_align.model.kept_memory import SMALLEST, keep_freed_memory, kept_empty

# Sizes that no other test uses, so that nothing of theirs is free here.
ROWS, WIDTH = 3, SMALLEST // 4


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_freed_memory_is_used_again_for_as_many_bytes() -> None:
    like = torch.empty(0)
    tensors = [kept_empty((ROWS, WIDTH), like) for _ in range(3)]
    places = {place(tensor) for tensor in tensors}
    assert len(places) == 3
    del tensors
    again = [kept_empty(shape, like) for shape in ((WIDTH, ROWS), (WIDTH * ROWS,))]
    again.append(kept_empty((2 * ROWS, WIDTH), like.bfloat16()))
    assert {place(tensor) for tensor in again} == places
    assert [tensor.shape for tensor in again] == [(WIDTH, ROWS), (WIDTH * ROWS,), (2 * ROWS, WIDTH)]
    assert [tensor.dtype for tensor in again] == [torch.float32, torch.float32, torch.bfloat16]
    assert place(kept_empty((ROWS, WIDTH), like)) not in places
    assert place(kept_empty((ROWS, WIDTH + 1), like)) not in places


@pytest.mark.parametrize("holder", ["a view", "a detached tensor", "a numpy array", "an autograd graph"])
def test_memory_in_use_is_nobody_elses(holder: str) -> None:
    tensor = kept_empty((ROWS + 1, WIDTH), torch.empty(0)).fill_(1.0)
    used = place(tensor)
    match holder:
        case "a view":
            kept = tensor[1, 5:7]
        case "a detached tensor":
            kept = tensor.detach()
        case "a numpy array":
            kept = tensor.numpy()
        case _:
            kept = torch.ones(WIDTH, requires_grad=True) * tensor  # keeps it for its backward
    del tensor
    other = kept_empty((ROWS + 1, WIDTH), torch.empty(0)).fill_(2.0)
    assert place(other) != used
    del kept
    assert place(kept_empty((ROWS + 1, WIDTH), torch.empty(0))) == used


def test_small_tensors_are_mallocs() -> None:
    tensor = kept_empty((2, 3), torch.empty(0, dtype=torch.float64))
    assert (tensor.shape, tensor.dtype) == ((2, 3), torch.float64)


def test_threads_get_memory_of_their_own() -> None:
    """What several threads write at the same time, over and over, is what each of them reads back."""
    wrong: list[int] = []

    def write(value: int) -> None:
        for _ in range(40):
            tensor = kept_empty((SMALLEST + 4,), torch.empty(0, dtype=torch.uint8)).fill_(value)
            if int(tensor.min()) != value or int(tensor.max()) != value:
                wrong.append(value)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weight_gradients_live_in_kept_memory() -> None:
    """Gradients of a step lie where those of the step before lay, and accumulate into what they should."""
    weights = [nn.Parameter(torch.randn(2, 512, 513)) for _ in range(2)]
    rows, counts = torch.randn(7, 513), torch.tensor([3, 4])

    def step() -> list[torch.Tensor]:
        torch.stack([grouped_linear(rows, counts, w).square().sum() for w in weights]).sum().backward()
        return [w.grad for w in weights if w.grad is not None]

    first = [grad.clone() for grad in step()]
    places = {place(w.grad) for w in weights if w.grad is not None}
    doubled = step()
    torch.testing.assert_close(doubled, [2 * grad for grad in first])
    for weight in weights:
        weight.grad = None
    del doubled
    assert places <= {place(grad) for grad in step()} | {place(kept_empty((2, 512, 513), rows))}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_malloc_takes_pages_only_once() -> None:
    keep_freed_memory()
    sizes = [2**20 + 1024 * i for i in range(20)]  # floats, so 4 MiB each and a little more
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(size) for size in sizes]
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del tensors
        gc.collect()
    assert faults[2] < sum(sizes) / 1024 / 20
