"""Expert parallelism and sharding: one model over many processes, equal to one process up to rounding.

The routed experts are split over `ep` consecutive ranks (so inside a node) and their tokens travel by all-to-all; what
is left of each expert tensor, and everything else, is sharded by FSDP2. The modules stay transformers' own: expert
weights become DTensors, the experts implementation finds an `exchange` on its module and uses it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from dots_align.config import ParallelSection
from dots_align.model import experts
from dots_align.model.router import moe_layers

# ------------------------------------------------------------------------------------------------------------- layout


def check_layout(parallel: ParallelSection, world_size: int, num_experts: int) -> None:
    """Raises ValueError if the layout cannot be launched on `world_size` processes."""
    ep, replicas = parallel.ep, parallel.dp_replicate
    if world_size % (ep * replicas):
        raise ValueError(
            f"parallel.ep={ep} times parallel.dp_replicate={replicas} does not divide the {world_size} processes of "
            f"this launch; launch a multiple of {ep * replicas}, or lower them"
        )
    if num_experts % ep:
        fitting = [n for n in range(1, num_experts + 1) if num_experts % n == 0 and world_size % (n * replicas) == 0]
        raise ValueError(
            f"parallel.ep={ep} does not divide the model's {num_experts} routed experts; on {world_size} processes "
            f"it can be {', '.join(map(str, fitting))}"
        )


@dataclass(frozen=True)
class Meshes:
    """Who shares what. `dense` (dp_replicate, dp_shard): all parameters but the routed experts, over all ranks.
    `experts` (dp_replicate, dp_shard): the ranks that hold the same experts. `ep`: consecutive ranks that hold
    different ones. Meshes without replicas have one dimension.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    ep: DeviceMesh

    @staticmethod
    def build(parallel: ParallelSection, device_type: str) -> Meshes:
        world, ep, replicas = dist.get_world_size(), parallel.ep, parallel.dp_replicate
        shards = world // (replicas * ep)
        names = ("dp_replicate", "dp_shard", "ep")
        # FSDP2 wants the mesh of the expert split and its own to come from one root.
        root = init_device_mesh(device_type, (replicas, shards, ep), mesh_dim_names=names)
        dense = init_device_mesh(device_type, (replicas, shards * ep), mesh_dim_names=names[:2])
        if replicas == 1:
            return Meshes(dense["dp_shard"], root["dp_shard"], root["ep"])
        return Meshes(dense, root["dp_replicate", "dp_shard"], root["ep"])


# ----------------------------------------------------------------------------------------------------- token exchange


@dataclass
class _Transfer:
    """One all-to-all of rows: how many rows each rank gets and sends, and the call in flight, if any."""

    group: Any
    received: list[int]
    sent: list[int]
    work: Any = None
    arriving: torch.Tensor | None = None

    def launch(self, rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        self.arriving = out = rows.new_empty(sum(received), *rows.shape[1:])
        self.work = dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group, async_op=True)
        return out

    def wait(self) -> torch.Tensor:
        self.work.wait()
        arrived, self.arriving, self.work = self.arriving, None, None
        assert arrived is not None
        return arrived


class _Depart(torch.autograd.Function):
    """Starts sending rows; in backward, the end of what `_Arrive` started."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, transfer: _Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        return transfer.launch(rows, transfer.received, transfer.sent)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.transfer.wait(), None  # `gradient` only stood for it


class _Arrive(torch.autograd.Function):
    """Waits for rows; in backward, starts sending their gradients home.

    Autograd runs what was computed last first, so work done between departure and arrival overlaps in both directions.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, transfer: _Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.transfer.launch(gradient, ctx.transfer.sent, ctx.transfer.received)
        return gradient, None  # autograd wants the shape of what went in


class _Permute(torch.autograd.Function):
    """`rows[order]` for a permutation, whose backward is a gather as well and so deterministic."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


class TokenExchange:
    """Sends rows to the ranks that hold their experts, and the results back.

    Exactly the routed rows travel, T * k of them each way, however skewed the routing is; the counts go first, and
    reading them is the only host synchronisation of a layer.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.size = mesh.get_group(), mesh.size()

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> Travelling:
        """rows [M, H] sorted by expert, counts [E] rows of every expert of the model; returns at once."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        per_source = received.view(self.size, -1)  # [ranks, own experts]
        sent, arriving = torch.stack([counts.view(self.size, -1).sum(1), per_source.sum(1)]).tolist()
        transfer = _Transfer(self.group, arriving, sent)
        return Travelling(_Depart.apply(rows, transfer), transfer, per_source)  # pyright: ignore[reportArgumentType]


@dataclass
class Travelling:
    """Rows on their way to their experts."""

    rows: torch.Tensor
    transfer: _Transfer
    per_source: torch.Tensor

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [M', H] that arrived here, sorted by own expert, and their counts [own experts]."""
        rows = _Arrive.apply(self.rows, self.transfer)
        own = torch.arange(self.per_source.shape[1], device=self.per_source.device).repeat(len(self.per_source))
        arrived_as = torch.repeat_interleave(own, self.per_source.flatten(), output_size=sum(self.transfer.received))
        self.order = arrived_as.argsort(stable=True)
        self.inverse = self.order.argsort()
        sorted_rows = _Permute.apply(rows, self.order, self.inverse)
        return sorted_rows, self.per_source.sum(0)  # pyright: ignore[reportReturnType]

    def combine(self, out: torch.Tensor) -> torch.Tensor:
        """Sends results home: [M', H] in the order of `wait` -> [M, H] in the order of `dispatch`."""
        there = self.transfer
        back = _Transfer(there.group, received=there.sent, sent=there.received)
        home: Any = _Depart.apply(_Permute.apply(out, self.inverse, self.order), back)
        return _Arrive.apply(home, back)  # pyright: ignore[reportReturnType]


def moe_forward(block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """`Dots1MoE.forward` with the shared experts computed while tokens travel. [..., H] -> [..., H]"""
    chosen, weights = block.route_tokens_to_experts(block.gate(hidden_states))
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    routed, shared = block.experts(flat, chosen, weights, meanwhile=lambda: block.shared_experts(hidden_states))
    return routed.view(hidden_states.shape) + shared


# ----------------------------------------------------------------------------------------------------------- sharding


def shard_model(model: Any, parallel: ParallelSection, compute_dtype: torch.dtype | None, device_type: str) -> Meshes:
    """Splits a dots1 model (bare or under adapters, real or on meta) over all ranks, in place.

    Args:
        compute_dtype: what parameters are gathered in, None for their own; gradients are reduced in fp32 and the
        router computes in fp32 always.

    The mean over ranks is what gradients are: a loss that is a rank's share of the batch has to be multiplied by the
    number of ranks, as transformers' Trainer does.
    """
    meshes = Meshes.build(parallel, device_type)
    reduce_dtype = torch.float32 if compute_dtype is not None else None
    # Inputs are not cast: the routing weights that enter the experts are fp32 and have to stay so.
    mixed = MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False)
    fp32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    reshard = parallel.reshard_after_forward
    for _, block in moe_layers(model):
        _split_experts(block, meshes.ep)
        _shard(block.experts, meshes.experts, mixed, reshard, shard_placement_fn=_expert_placement(meshes.experts))
        _average_over_world(block.experts, meshes.experts)
        _shard(block.gate, meshes.dense, fp32, False)  # small: not worth gathering twice
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        _shard(layer, meshes.dense, mixed, reshard)
    _shard(base.model.embed_tokens, meshes.dense, mixed, reshard)
    _shard([base.model.norm, base.lm_head], meshes.dense, mixed, False)  # backward begins with them
    _shard(model, meshes.dense, mixed, False)
    model.gathered_dtype = compute_dtype
    model._is_accelerate_prepared = True  # accelerate would wrap it in DDP
    model.no_sync = functools.partial(no_gradient_sync, model)  # what accelerate calls while it accumulates
    return meshes


def _shard(module: Any, mesh: DeviceMesh, mixed: MixedPrecisionPolicy, reshard: bool, **options: Any) -> None:
    sharded: Any = fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=reshard, **options)
    for part in sharded if isinstance(sharded, list) else [sharded]:
        part.reshards_after_forward = reshard


def _split_experts(block: Any, ep: DeviceMesh) -> None:
    """Leaves this rank its share of the experts, as DTensors split on dim 0, and lets tokens travel to the others."""
    if ep.size() == 1:
        return
    if block.config._experts_implementation != experts.IMPLEMENTATION:
        raise ValueError(
            f"parallel.ep={ep.size()} needs model.experts_implementation=grouped, "
            f"not {block.config._experts_implementation}"
        )
    own = block.experts.num_experts // ep.size()
    first = ep.get_local_rank() * own
    for module in block.experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = parameter.detach()[first : first + own].clone()
            split = DTensor.from_local(part, ep, [Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(split, requires_grad=parameter.requires_grad))
    block.experts.exchange = TokenExchange(ep)
    block.forward = types.MethodType(moe_forward, block)


def _expert_placement(mesh: DeviceMesh):
    """FSDP2 splits evenly on any dim but the first, which is the experts'."""
    size = mesh.shape[-1]

    def place(parameter: nn.Parameter) -> Shard:
        for dim in (1, 2):
            if parameter.shape[dim] % size == 0:
                return Shard(dim)
        raise ValueError(
            f"an expert tensor {tuple(parameter.shape)} cannot be split evenly over {size} processes; use a larger "
            "parallel.ep or parallel.dp_replicate"
        )

    return place


def _average_over_world(module: Any, mesh: DeviceMesh) -> None:
    """Tokens of the whole EP group went through these weights: divide by all ranks, not by those of `mesh` alone."""
    module.set_gradient_divide_factor(float(dist.get_world_size()))
    if mesh.shape[-1] > 1:
        # gloo cannot multiply while it sums. Over a single rank FSDP2 divides by itself, and with this flag once more
        # (torch 2.13, foreach_reduce).
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What a (possibly sharded) model's activations are in."""
    return getattr(model, "gathered_dtype", None) or next(model.parameters()).dtype


@contextmanager
def no_gradient_sync(model: Any) -> Iterator[None]:
    """Backward inside only accumulates gradients; the first one outside reduces them all."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def reshard(model: nn.Module) -> None:
    """Lets go of what forwards without backward have left gathered. Until then the modules' parameters are temporary
    whole ones: nobody may take them for the ones to train or to save.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Keeps whole layers in memory over many forwards without gradient, such as a rollout, instead of gathering each
    layer every time.
    """
    shards: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module.reshards_after_forward, recurse=False)


# ------------------------------------------------------------------------------------------------------ gradient norm


def _copies(tensor: torch.Tensor) -> int:
    """How many ranks hold the same part of it."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    count = 1
    for size, placement in sizes:
        count *= size if isinstance(placement, Replicate) else 1
    return count


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients so that their norm over all parameters and meshes is at most `max_norm`.

    One norm: every rank sums the squares of what it holds, and one all-reduce of one number adds them up.

    Returns:
        the norm before, fp32 scalar, the same on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [experts.local(g) for g in gradients]
    if not parts and not dist.is_initialized():
        return torch.zeros(())
    device = parts[0].device if parts else "cpu"
    total = torch.zeros((), dtype=torch.float32, device=device)
    norms = torch._foreach_norm(parts, 2, dtype=torch.float32) if parts else []
    for norm, gradient in zip(norms, gradients, strict=True):
        total += norm.square() / _copies(gradient)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # Times 1 is a pass over all gradients for nothing; of a GPU, to ask would be to wait.
    if parts and not (total.is_cpu and factor == 1.0):
        torch._foreach_mul_(parts, factor)
    return norm
