"""Hub-layout checkpoints straight into the shards of a model and back; no rank ever holds the whole model.

The hub has one tensor for each expert and projection, the model one for all experts of a layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
CORRECTION_BIAS = "e_score_correction_bias"
VALUE_HEAD, SCORE_HEAD = "lm_head.weight", "score.weight"
"""What the one row of a critic or a reward model is called in the model, and in a reward model's files."""
STORED = ("F32", "BF16", "F16", "F64")
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def hub_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a dots1 model (bare or under adapters, which are left out), by the name they
    have without adapters; experts are still fused.
    """
    stored = set(model.state_dict())
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and "lora" not in name:
            found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    return found


def open_shard(path: Path) -> Any:
    """A safetensors file, of which nothing but the header is read yet. Raises ValueError if that is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be loaded: {error}; copy it again") from None


def check_dtypes(directory: Path) -> None:
    """Raises ValueError if a tensor in a directory's safetensors files is quantized, which transformers would not."""
    for path in sorted(directory.glob("*.safetensors")):
        with open_shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                _check_dtype(path, name, shard.get_slice(name))


def _check_dtype(path: Path, name: str, tensor: Any) -> None:
    """Without its scales, the numbers of a quantized tensor are no weights."""
    if (dtype := tensor.get_dtype()) not in STORED:
        raise ValueError(
            f"{path}: {name} is stored as {dtype}; dots_align reads {', '.join(STORED)}: give it a checkpoint that is "
            "not quantized"
        )


class HubFiles:
    """Slices of tensors in the safetensors files of a directory, opened when first needed.

    Raises:
        ValueError: a file is damaged; or, in whatever reads one, a tensor is missing, quantized or of another shape.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        if (directory / INDEX).is_file():
            self.file_of: dict[str, str] = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        else:
            with open_shard(directory / WEIGHTS) as file:
                self.file_of = dict.fromkeys(file.keys(), WEIGHTS)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        if name == VALUE_HEAD and name not in self.file_of and SCORE_HEAD in self.file_of:
            name = SCORE_HEAD
        if name not in self.file_of:
            raise ValueError(f"{self.directory}: tensor {name} is missing; the checkpoint is not whole")
        file = self.file_of[name]
        if file not in self._open:
            self._open[file] = open_shard(self.directory / file)
        tensor = self._open[file].get_slice(name)
        _check_dtype(self.directory / file, name, tensor)
        return tensor

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> torch.Tensor:
        tensor = self._slice(name)
        if tuple(tensor.get_shape()) != shape:
            raise ValueError(
                f"{self.directory}: tensor {name} has shape {tuple(tensor.get_shape())}, its config.json says {shape}"
            )
        return tensor[part] if part else tensor[...]


@torch.no_grad()
def load_weights(model: nn.Module, source: Path | HubFiles, leave_out: Collection[str] = ()) -> None:
    """Fills the local part of every weight, but for those named, from a full checkpoint's directory or files; each rank
    reads only what it keeps.

    Raises:
        ValueError: a tensor is missing or has another shape than the model's configuration says.
    """
    files = source if isinstance(source, HubFiles) else HubFiles(source)
    for name, tensor in hub_tensors(model).items():
        target, part = own_part(tensor)
        if target.numel() and name not in leave_out:
            fill(files, name, tensor.shape, part, target)


def fill(files: HubFiles, name: str, shape: torch.Size, part: tuple[slice, ...], target: torch.Tensor) -> None:
    """Reads `part` of the model's tensor `name`, which as a whole has `shape`, into `target`."""
    if experts := _EXPERTS.fullmatch(name):
        _load_experts(files, experts[1], experts[2], shape, part, target)
    else:
        target.copy_(files.read(name, tuple(shape), part))


def _load_experts(
    files: HubFiles, prefix: str, name: str, shape: torch.Size, part: tuple[slice, ...], target: torch.Tensor
) -> None:
    """One fused tensor's local part [experts, rows, columns] from the hub's tensors of single experts."""
    _, rows, columns = part
    if name == "down_proj":
        halves = [("down_proj", 0, shape[1])]
    else:  # rows [0, I) are the gate's, [I, 2I) those of up
        half = shape[1] // 2
        halves = [("gate_proj", 0, half), ("up_proj", half, shape[1])]
    for place, expert in enumerate(range(part[0].start, part[0].stop)):
        for projection, first, end in halves:
            begin, stop = max(rows.start, first), min(rows.stop, end)
            if begin < stop:
                wanted = (slice(begin - first, stop - first), columns)
                tensor = files.read(f"{prefix}.{expert}.{projection}.weight", (end - first, shape[2]), wanted)
                target[place, begin - rows.start : stop - rows.start].copy_(tensor)


def as_hub(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A fused experts tensor (on any device, meta too) as the hub's single ones; others as they are."""
    experts = _EXPERTS.fullmatch(name)
    if experts is None:
        yield name, tensor
        return
    for expert, weights in enumerate(tensor):
        if experts[2] == "down_proj":
            yield f"{experts[1]}.{expert}.down_proj.weight", weights
        else:
            gate, up = weights.chunk(2)
            yield f"{experts[1]}.{expert}.gate_proj.weight", gate
            yield f"{experts[1]}.{expert}.up_proj.weight", up


def full_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The whole of a (possibly sharded) tensor on the host; collective. Converted before it is gathered."""
    tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def own_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """What this rank holds of a (possibly sharded) tensor, sharing its storage, and where in the whole that lies."""
    shape, offset, own = tuple(tensor.shape), (0,) * tensor.dim(), tensor
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        own = tensor.to_local()
    return own, tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))


def place_part(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Writes this rank's part of `whole` into a (possibly sharded) parameter."""
    with torch.no_grad():
        own, part = own_part(parameter)
        own.copy_(whole[part])


@dataclass(frozen=True)
class Source:
    """A tensor to save, in the model's fused layout: its size in the file, and how to get the whole of it on the host
    (collective).
    """

    nbytes: int
    gather: Callable[[], torch.Tensor]


@torch.no_grad()
def save_weights(
    model: nn.Module,
    directory: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    stored_as: Mapping[str, str] | None = None,
) -> None:
    """Writes the hub's layout, gathering one tensor at a time; collective.

    Args:
        dtype: stored dtype, each tensor's own if None; correction biases stay fp32.
        stored_as: names in the files of tensors that have another one there.
    """
    stored_as = stored_as or {}
    sources = {}
    for name, tensor in hub_tensors(model).items():
        stored = torch.float32 if name.endswith(CORRECTION_BIAS) else dtype or tensor.dtype
        sources[stored_as.get(name, name)] = Source(
            tensor.numel() * stored.itemsize, partial(full_tensor, tensor, stored)
        )
    write_files(sources, directory, max_shard_bytes)


@torch.no_grad()
def write_files(sources: dict[str, Source], directory: Path, max_shard_bytes: int = 5 << 30) -> None:
    """Writes `model*.safetensors` in the hub's layout from tensors in the model's; collective.

    Files are written by the ranks in turn, so that at most one file's tensors are in one rank's host memory.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, source in sources.items():
        if shards[-1] and source.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= source.nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        mine: dict[str, torch.Tensor] = {}
        for name in names:
            for hub_name, tensor in as_hub(name, sources[name].gather()):
                weight_map[hub_name] = file
                total += tensor.nbytes
                if rank == number % world:
                    mine[hub_name] = tensor.contiguous()
        if mine:
            save_file(mine, directory / file, metadata={"format": "pt"})
    if len(shards) > 1 and rank == 0:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if world > 1:
        dist.barrier()
