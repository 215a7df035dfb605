"""Weights from a trainer into another model, proven: every parameter and buffer, bit for bit, or no generation.

    declared = manifest(trainer, torch.bfloat16)      # what there is, and how it will arrive
    receiver = WeightReceiver(engine_model)
    certificate = receiver.update(stream(trainer, declared), declared)

Inside the trainer's process the engine runs the trainer's own tensors and needs none of this; between processes
`transport.py` carries the manifest and the stream. Whoever generates asks `receiver.check()` first, which raises until
an update has succeeded after one that failed. What was computed with older weights (cached keys and values) is its
owner's to drop: `receiver.updates` counts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dots_align.model.expert_parallel import is_sharded, reshard
from dots_align.model.sharded_io import own_part
from dots_align.rollout.canary import Canary, canary_problem, make_canary
from dots_align.runtime import gather_objects

NAMED = 5  # tensors an error message lists before it only counts


# ------------------------------------------------------------------------------------------------------------ checksum

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = {"cpu": 1 << 18}  # elements: what a core's cache holds of their products
_CHUNK_ELSEWHERE = 1 << 26


def _weights(part: slice, dim: int, device: torch.device) -> torch.Tensor:
    """An odd pseudo-random int64 for each index in `part` of dimension `dim` (the finaliser of splitmix64)."""
    x = (torch.arange(part.start, part.stop, device=device) + (dim + 1 << 48)) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)) | 1


@torch.no_grad()
def checksum(tensor: torch.Tensor, part: Sequence[slice] | None = None) -> int:
    """A sum over the raw bits of every element times a weight of its place, modulo 2^64, on the tensor's own device.

    Being a sum it does not depend on the order of addition, and the parts of a tensor add up to the whole. Weights are
    odd, so that one flipped bit always shows; and products of a number per dimension and index, so that what was
    permuted, transposed or moved shows as well.

    Args:
        tensor: of any dtype and device, not sharded.
        part: where it lies in a larger tensor; the whole if not given.
    """
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
    part = part or [slice(0, size) for size in bits.shape]
    if bits.dim() == 0:
        return int(bits)
    rows = torch.ones(1, dtype=torch.int64, device=bits.device)
    for dim in range(bits.dim() - 1):
        rows = (rows[:, None] * _weights(part[dim], dim, bits.device)).flatten()
    columns = _weights(part[-1], bits.dim() - 1, bits.device)
    bits, total = bits.reshape(len(rows), len(columns)), torch.zeros((), dtype=torch.int64, device=bits.device)
    step = max(1, _CHUNK.get(bits.device.type, _CHUNK_ELSEWHERE) // max(len(columns), 1))
    for first in range(0, len(rows), step):
        total += ((bits[first : first + step] * columns).sum(-1) * rows[first : first + step]).sum()
    return int(total)


def combined(checksums: Mapping[str, int]) -> int:
    """One number, unsigned 64 bits, for the checksums of many tensors in any order."""
    return sum((zlib.crc32(name.encode()) * 2 + 1) * value for name, value in checksums.items()) % (1 << 64)


# ------------------------------------------------------------------------------------------------- manifest and stream


@dataclass(frozen=True)
class Entry:
    """A tensor of the sender: its whole shape, its dtype there, and the dtype in which it is sent and kept."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sent_as: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.sent_as.itemsize


@dataclass(frozen=True)
class Manifest:
    """Everything that an update holds, in the order in which it is sent; what the sender computes on a prompt too."""

    entries: tuple[Entry, ...]
    canary: Canary | None = None

    def with_canary(self, model: nn.Module) -> Manifest:
        """Adds what `model` says to a fixed prompt; of a sharded model all its processes call it."""
        return replace(self, canary=make_canary(model))


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer, persistent or not, by name; experts fused as they are in the module."""
    reshard(model)  # until then a sharded model may show temporary tensors
    return dict([*model.named_parameters(), *model.named_buffers()])


def manifest(model: nn.Module, dtype: torch.dtype | Mapping[str, torch.dtype] | None = None) -> Manifest:
    """Lists a model's tensors, plain or sharded.

    Args:
        dtype: what they are converted to on their way. One dtype means all floating-point parameters; buffers (the
        routing bias, the rotary frequencies) then stay as they are. A mapping says it for each name in it. None: no
        conversion.
    """
    parameters = dict(model.named_parameters())

    def sent_as(name: str, tensor: torch.Tensor) -> torch.dtype:
        if isinstance(dtype, Mapping):
            return dtype.get(name, tensor.dtype)
        converted = dtype is not None and name in parameters and tensor.is_floating_point()
        return dtype if converted else tensor.dtype  # pyright: ignore[reportReturnType]

    tensors = model_tensors(model)
    return Manifest(tuple(Entry(n, tuple(t.shape), t.dtype, sent_as(n, t)) for n, t in tensors.items()))


class WeightStream:
    """(name, tensor) pairs, and, once they have gone by, the sender's checksum of each."""

    def __init__(self, items: Iterable[tuple[str, torch.Tensor]], checksums: dict[str, int] | None = None) -> None:
        self._items = items
        self.checksums: dict[str, int] = {} if checksums is None else checksums

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._items)


def stream(model: nn.Module, declared: Manifest) -> WeightStream:
    """A model's tensors as `declared`, whole, one at a time.

    Of a sharded model each is converted, then gathered: all its processes have to iterate, in step, and one whole
    tensor at a time is in their memory. Checksums are of the converted bits.
    """
    tensors, checksums = model_tensors(model), {}

    def items() -> Iterator[tuple[str, torch.Tensor]]:
        for entry in declared.entries:
            tensor = tensors[entry.name].detach().to(entry.sent_as)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            checksums[entry.name] = checksum(whole)
            yield entry.name, whole

    return WeightStream(items(), checksums)


# ------------------------------------------------------------------------------------------------------------ receiver


@dataclass(frozen=True)
class Certificate:
    """Of an update that succeeded: tensors declared and written, and one checksum over all as sent and as now held."""

    count_expected: int
    count_written: int
    sent: int
    held: int

    def __str__(self) -> str:
        return f"{self.count_written} of {self.count_expected} tensors written, checksum {self.held:016x}"


def _listed(trouble: str, names: Sequence[str]) -> list[str]:
    """One line about several tensors, or none."""
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"{trouble}: {', '.join(names[:NAMED])}{more}"]


@dataclass(frozen=True)
class _Arrived:
    """Checksums of a tensor as it arrived, and of the part of it that this process keeps."""

    whole: int
    part: int


class WeightReceiver:
    """Writes updates in place into a model, plain or sharded, and keeps it from being used while it is not whole.

    Of a sharded model every process has a receiver of its own and gets every tensor; all of them refuse if one does.

    Args:
        model: the target; its tensors keep their storage.
        refusal: why it must not generate before the first update, where its weights mean nothing yet.

    Attributes:
        refusal: why the model must not generate now; None if it may.
        updates: how many updates have succeeded, for whoever keeps something that was computed from the weights.
        certificate: of the last update that succeeded.
    """

    def __init__(self, model: nn.Module, refusal: str | None = None) -> None:
        self.model, self.refusal = model, refusal
        self.updates = 0
        self.certificate: Certificate | None = None
        self._targets: dict[str, torch.Tensor] = {}
        self._entries: dict[str, Entry] = {}
        self._written: dict[str, _Arrived | None] = {}
        self._problems: list[str] = []
        self._canary: Canary | None = None

    def check(self) -> None:
        """Raises ValueError if the model must not generate."""
        if self.refusal is not None:
            raise ValueError(f"not generating: {self.refusal}; send the weights again")

    def update(self, stream: WeightStream, declared: Manifest) -> Certificate:
        """Receives a whole update: `begin`, then `fill`."""
        self.begin(declared)
        return self.fill(stream)

    def begin(self, declared: Manifest) -> None:
        """Compares a manifest with the model; nothing is written yet, but from here on generation is refused.

        Raises:
            ValueError: names the tensors that are missing, surplus, or of another shape or dtype.
        """
        self.refusal = "a weight update has begun and not ended"
        self._targets = model_tensors(self.model)
        self._entries = {entry.name: entry for entry in declared.entries}
        self._written, self._problems, self._canary = {}, [], declared.canary
        self._settle(self._mismatches(), "the weight update does not fit the model")

    def _mismatches(self) -> list[str]:
        both = [(entry, self._targets[name]) for name, entry in self._entries.items() if name in self._targets]
        shapes = [f"{e.name} ({list(e.shape)} for {list(t.shape)})" for e, t in both if e.shape != tuple(t.shape)]
        dtypes = [f"{e.name} ({e.sent_as} for {t.dtype})" for e, t in both if e.sent_as != t.dtype]
        return [
            *_listed("missing", [n for n in self._targets if n not in self._entries]),
            *_listed("surplus", [n for n in self._entries if n not in self._targets]),
            *_listed("other shape", shapes),
            *_listed("other dtype, and no conversion declared", dtypes),
        ]

    def fill(self, stream: WeightStream) -> Certificate:
        """Writes what the manifest announced, and checks it; after this, generation is allowed.

        Raises:
            ValueError: names the tensors that never arrived, that nobody announced or that have other bits than were
            sent; or says how the canary differs.
        """
        try:
            for name, tensor in stream:
                self._write(name, tensor)
        except Exception as error:
            self.refusal = f"a weight update broke off: {error}"
            raise
        return self._finish(stream.checksums)

    @torch.no_grad()
    def _write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one whole tensor, on any device, into its place. What is wrong with it is told at the end, so that the
        rest of the stream does not get stuck in the sender.
        """
        entry = self._entries.get(name)
        if entry is None or name in self._written:
            self._problems.append(f"{name} arrived {'unannounced' if entry is None else 'twice'}")
        elif (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.sent_as):
            found = f"{list(tensor.shape)} {tensor.dtype}"
            self._problems.append(f"{name} arrived as {found}, declared {list(entry.shape)} {entry.sent_as}")
        else:
            own, part = own_part(self._targets[name])
            own.copy_(tensor[part])
            whole = not isinstance(self._targets[name], DTensor)
            self._written[name] = None if whole else _Arrived(checksum(tensor), checksum(tensor[part], part))

    def _finish(self, checksums: Mapping[str, int]) -> Certificate:
        """Compares what the model holds now with the sender's checksums, then the canary, and allows generation."""
        held = self._held()
        problems = [
            *self._problems,
            *_listed("never arrived", [n for n in self._entries if n not in self._written]),
            *_listed("of other bits than were sent", [n for n, h in held.items() if h != checksums.get(n)]),
        ]
        self._settle(problems, "the weight update is not whole")
        canary = canary_problem(self.model, self._canary) if self._canary is not None else None
        self._settle([canary] if canary else [], "the weights arrived, but compute something else here")
        self.refusal, self.updates = None, self.updates + 1
        self.certificate = Certificate(len(self._entries), len(held), combined(checksums), combined(held))
        return self.certificate

    def _held(self) -> dict[str, int]:
        """The checksum of each tensor written, of what the model holds now."""
        found = {}
        for name, arrived in self._written.items():
            own, part = own_part(self._targets[name])
            held = checksum(own, part)
            # Where the model holds a part, it is that of what arrived, and what arrived is compared as a whole.
            found[name] = held if arrived is None else arrived.whole if held == arrived.part else ~arrived.whole
        return found

    def _settle(self, problems: list[str], what: str) -> None:
        """Raises, and refuses from now on, if there is a problem in any process of the model."""
        problem = f"{what}: {'; '.join(problems)}" if problems else None
        if is_sharded(self.model):
            problem = next((p for p in gather_objects(problem) if p), None)
        if problem:
            self.refusal = problem
            raise ValueError(problem)
