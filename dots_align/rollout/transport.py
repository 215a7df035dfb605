"""Carries weight updates from a trainer's processes to engines in others.

    channel = connect("10.0.0.1:29700", rank=0, size=3)      # the trainer's sending process; engines are ranks 1 and 2
    send_weights(policy, channel, manifest(policy, torch.bfloat16).with_canary(policy))

    channel = connect("10.0.0.1:29700", rank=1, size=3)
    receive_weights(receiver, channel)

A channel is a process group of its own, because trainer and engines are launches of their own; a group made by
`torch.distributed.new_group` serves as well (`Channel.of`). Rank 0 sends.

An update goes: the manifest; every receiver's consent; buckets of tensors, each after a header that says what is in it;
the checksums; every receiver's certificate. All of it is broadcasts, so any backend will do.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dots_align.model.expert_parallel import is_sharded
from dots_align.rollout.sync import Certificate, Entry, Manifest, WeightReceiver, WeightStream, stream
from dots_align.runtime import gather_objects

BUCKET_BYTES = 256 << 20
_ALIGNMENT = 16  # bytes, so that every tensor in a bucket can be seen in its dtype
_MOST = 255  # tensors in a bucket: the header has a fixed size
_END, _BROKEN = 0, -1  # what a header says instead of a number of tensors


class Channel:
    """Broadcasts among `size` processes over a torch process group, its own `rank` among them."""

    def __init__(self, group: Any, rank: int, size: int, device: torch.device) -> None:
        self.group, self.rank, self.size, self.device = group, rank, size, device

    @staticmethod
    def of(group: dist.ProcessGroup) -> Channel:
        """Over a group of the default world."""
        return Channel(group, dist.get_rank(group), dist.get_world_size(group), _device(dist.get_backend(group)))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Overwrites `tensor`, which lies on `device`, with the root's.

        Raises:
            ConnectionError: another process is gone, or silent for longer than the group waits.
        """
        try:
            self.group.broadcast(tensor, root).wait()
        except RuntimeError as error:
            raise ConnectionError(f"the connection between trainer and engines is lost: {error}") from error

    def share(self, value: Any, root: int = 0) -> Any:
        """The root's value, which can be pickled, on every process."""
        mine = self.rank == root
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if mine else torch.empty(0)
        size = torch.tensor([data.numel()], device=self.device)
        self.broadcast(size, root)
        buffer = data.to(self.device) if mine else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self.broadcast(buffer, root)
        return value if mine else pickle.loads(buffer.cpu().numpy().tobytes())

    def answers(self, mine: Any = None) -> list[Any]:
        """What each process but the sender says, on every process."""
        return [self.share(mine, root) for root in range(1, self.size)]


def _device(backend: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")


def connect(
    address: str, rank: int, size: int, backend: str = "gloo", timeout: timedelta = timedelta(minutes=10)
) -> Channel:
    """Meets the other processes of a channel; whatever default process group each of them has is left alone.

    Args:
        address: `host:port` where rank 0, the sender, can be reached.
        backend: `gloo` or `nccl`; nccl uses the current CUDA device.
        timeout: a process that waits longer for another one gives up.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"the address of the weight channel is host:port, for example 10.0.0.1:29700, not {address!r}")
    store = dist.TCPStore(host, int(port), size, is_master=rank == 0, timeout=timeout)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return Channel(dist.ProcessGroupNCCL(store, rank, size, options), rank, size, _device(backend))
    if backend != "gloo":
        raise ValueError(f"the weight channel's backend is gloo or nccl, not {backend!r}")
    return Channel(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size, _device(backend))


# ------------------------------------------------------------------------------------------------------------- buckets


def _layout(entries: list[Entry]) -> tuple[list[int], int]:
    """Where each tensor begins in a bucket of them, and the bucket's size, in bytes."""
    starts, end = [], 0
    for entry in entries:
        starts.append(end)
        end += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _buckets(
    items: Iterable[tuple[str, torch.Tensor]], entries: dict[str, Entry], bucket_bytes: int
) -> Iterator[list[tuple[Entry, torch.Tensor]]]:
    """Groups of tensors of at most `bucket_bytes` together, or one that is larger."""
    bucket, room = [], bucket_bytes
    for name, tensor in items:
        entry = entries.get(name)
        if entry is None or (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.sent_as):
            raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype} is not what the manifest says: {entry}")
        if bucket and (entry.nbytes > room or len(bucket) == _MOST):
            yield bucket
            bucket, room = [], bucket_bytes
        bucket.append((entry, tensor))
        room -= entry.nbytes + _ALIGNMENT
    if bucket:
        yield bucket


def _header(channel: Channel, numbers: list[int]) -> list[int]:
    """Broadcasts a bucket's header: how many tensors, and the number of each in the manifest."""
    header = torch.full((_MOST + 1,), -1)
    header[: len(numbers)] = torch.tensor(numbers)
    header = header.to(channel.device)
    channel.broadcast(header)
    return header.tolist()


def _send_bucket(channel: Channel, bucket: list[tuple[Entry, torch.Tensor]], place: dict[str, int]) -> None:
    starts, size = _layout([entry for entry, _ in bucket])
    buffer = torch.empty(size, dtype=torch.uint8, device=channel.device)
    for (entry, tensor), start in zip(bucket, starts, strict=True):
        target = buffer[start : start + entry.nbytes].view(entry.sent_as).view(entry.shape)
        target.copy_(tensor)
    # Nothing may fail between the two: who has the header waits for the bucket.
    _header(channel, [len(bucket), *(place[entry.name] for entry, _ in bucket)])
    channel.broadcast(buffer)


def _incoming(channel: Channel, declared: Manifest, checksums: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The sender's tensors as they arrive, each valid until the next bucket; fills `checksums` at the end."""
    count = 0
    try:
        while (header := _header(channel, []))[0] > 0:
            entries = [declared.entries[number] for number in header[1 : 1 + header[0]]]
            starts, size = _layout(entries)
            buffer = torch.empty(size, dtype=torch.uint8, device=channel.device)
            channel.broadcast(buffer)
            for entry, start in zip(entries, starts, strict=True):
                count += 1
                yield entry.name, buffer[start : start + entry.nbytes].view(entry.sent_as).view(entry.shape)
        if header[0] == _BROKEN:
            raise ConnectionError(f"the sender gave up: {channel.share(None)}")
        checksums.update(channel.share(None))
    except ConnectionError as error:
        raise ConnectionError(f"after {count} of {len(declared.entries)} tensors: {error}") from error


# ---------------------------------------------------------------------------------------------------- send and receive


def send_weights(
    model: nn.Module,
    channel: Channel | None,
    declared: Manifest,
    items: WeightStream | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Certificate:
    """Sends a model, plain or sharded, to every receiver of a channel.

    Args:
        model: of a sharded one, all its processes call this; the first gives its `channel`, the others None.
        declared: `manifest(model, ...)`.
        items: what is sent, if not the model's own tensors.
        bucket_bytes: small tensors travel together, up to so many bytes; a larger tensor travels alone.

    Raises:
        ValueError: what a receiver found wrong; in every process of a sharded model.
        ConnectionError: a receiver is gone.
    """
    items = stream(model, declared) if items is None else items
    sender = _Sender(channel, declared, bucket_bytes) if channel is not None else None
    _share_failure(model, sender and sender.offer())
    _share_failure(model, sender.send(items) if sender is not None else _drain(items))
    certificate = sender.certificate if sender is not None else None
    certificate = next(c for c in gather_objects(certificate) if c) if is_sharded(model) else certificate
    assert certificate is not None
    return certificate


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def _share_failure(model: nn.Module, failure: Exception | None) -> None:
    """Raises what went wrong in any process of the model."""
    if is_sharded(model):
        failure = next((f for f in gather_objects(failure) if f), None)
    if failure:
        raise failure


class _Sender:
    """The sending end of one update. Failures are returned, not raised, so that the other processes of a sharded model
    can be told.
    """

    def __init__(self, channel: Channel, declared: Manifest, bucket_bytes: int) -> None:
        self.channel, self.declared, self.bucket_bytes = channel, declared, bucket_bytes
        self.certificate: Certificate | None = None

    def offer(self) -> Exception | None:
        """Sends the manifest and hears whether all can take it."""
        try:
            self.channel.share(self.declared)
            return _refused(self.channel.answers())
        except ConnectionError as error:
            return error

    def send(self, items: WeightStream) -> Exception | None:
        entries = {entry.name: entry for entry in self.declared.entries}
        place = {name: number for number, name in enumerate(entries)}
        iterator = iter(items)
        try:
            for bucket in _buckets(iterator, entries, self.bucket_bytes):
                _send_bucket(self.channel, bucket, place)
            _header(self.channel, [_END])
            self.channel.share(items.checksums)
            answers = self.channel.answers()
        except (ValueError, RuntimeError, OSError) as error:
            if not isinstance(error, ConnectionError):
                with contextlib.suppress(ConnectionError):  # a receiver may be gone as well
                    _header(self.channel, [_BROKEN])
                    self.channel.share(f"{type(error).__name__}: {error}")
            _drain(iterator)  # the other processes of a sharded model are gathering still
            return error
        self.certificate = next((answer for answer in answers if isinstance(answer, Certificate)), None)
        return _refused(answers)


def _refused(answers: list[Any]) -> ValueError | None:
    """What the receivers that did not agree have said."""
    problems = [f"receiver {rank}: {answer}" for rank, answer in enumerate(answers, 1) if isinstance(answer, str)]
    return ValueError("; ".join(problems)) if problems else None


def receive_weights(receiver: WeightReceiver, channel: Channel) -> Certificate:
    """Takes part in one update, as the sender begins it; of a sharded model all its processes do.

    Raises:
        ValueError: as `WeightReceiver` does; another receiver refused the update; the sender has been told.
        ConnectionError: the sender is gone, or gave up. The receiver refuses to generate until a later update, over a
        new channel, has succeeded.
    """
    try:
        declared = channel.share(None)
        _answered(receiver, channel, lambda: receiver.begin(declared))
        checksums: dict[str, int] = {}
        incoming = WeightStream(_incoming(channel, declared, checksums), checksums)
        return _answered(receiver, channel, lambda: receiver.fill(incoming))
    except ConnectionError as error:
        receiver.refusal = f"a weight update broke off: {error}"
        raise


def _answered(receiver: WeightReceiver, channel: Channel, step: Any) -> Any:
    """Does a step and tells everyone how it went."""
    failure, outcome = None, None
    try:
        outcome = step()
    except ValueError as error:
        failure = error
    answers = channel.answers(str(failure) if failure else outcome)
    if failure is None and (failure := _refused(answers)):
        receiver.refusal = str(failure)
    if failure:
        raise failure
    return outcome
