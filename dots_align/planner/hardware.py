"""The machines a plan is for: what they hold, and what they reach."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

# Of a GPU's memory, what tensors cannot have: CUDA's context and NCCL's buffers, and what the allocator loses to
# fragments. Assumptions; `expandable_segments` (recipes/accelerate) keeps the second small.
CONTEXT_BYTES = 2 * GIB
FRAGMENTED = 0.04
# Of a node's memory: each process with its libraries and data.
PROCESS_HOST_BYTES = 6 * GIB


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node with NVLink, and its peaks: `memory` in bytes, the rest in operations or bytes per second and
    direction; `infiniband` is its own adapter's.
    """

    name: str
    memory: int
    bf16: float = 989e12
    fp32: float = 67e12
    hbm: float = 3.35e12
    nvlink: float = 450e9
    infiniband: float = 50e9

    @property
    def reserve(self) -> int:
        return CONTEXT_BYTES + int(FRAGMENTED * self.memory)

    @property
    def usable(self) -> int:
        """What tensors may take."""
        return self.memory - self.reserve


# Memory as nvidia-smi counts it.
H100 = Gpu("H100-80", 81_559 * 2**20)
H200 = Gpu("H200-141", 143_771 * 2**20, hbm=4.8e12)
GPUS = (H100, H200)


@dataclass(frozen=True)
class Achieved:
    """Assumptions of the time estimate: which part of a peak real steps reach, and what a launch costs."""

    products: float = 0.40  # matrix products of a whole step: dense, grouped, attention, and what lies between them
    hbm: float = 0.70
    nvlink: float = 0.70
    infiniband: float = 0.80
    host_copy: float = 10e9  # bytes per second and GPU between GPU and pageable host memory
    host_memory: float = 150e9  # bytes per second and node for AdamW on the host, with enough threads
    launch: float = 0.5e-3  # seconds a layer costs the host in a decoding step, however few tokens there are


ACHIEVED = Achieved()
