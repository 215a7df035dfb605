"""Trainers and engines in processes of their own; imported by the processes that the launcher forks."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharding_cases import tiny_model

from dots_align.config import ParallelSection
from dots_align.model.expert_parallel import shard_model
from dots_align.rollout import transport
from dots_align.rollout.sync import Manifest, WeightReceiver, WeightStream, manifest, stream
from dots_align.rollout.transport import Channel, connect, receive_weights, send_weights

EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
SQUARE = "model.layers.2.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SMALL_BUCKETS = 20_000  # bytes: about fifteen buckets, and tensors that are larger than one
TIMEOUT = timedelta(minutes=5)

Tensors = Iterator[tuple[str, torch.Tensor]]


def trained() -> Any:
    """What the trainer has: the tiny model, moved."""
    model = tiny_model()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.mul_(1.25)
    return model


def of(part: str, ranks: int, parallel: dict[str, Any] | None, directory: str, model: Any) -> Any:
    """`model` as one part of the launch (`trainer`, `engine`) has it: sharded over `ranks` processes if there are
    more.
    """
    if ranks > 1:
        rank = int(os.environ["RANK"]) % ranks if part == "engine" else int(os.environ["RANK"])
        dist.init_process_group("gloo", f"file://{directory}/{part}", rank=rank, world_size=ranks)
        shard_model(model, ParallelSection(**(parallel or {})), None, "cpu")
    return model


def zeroed(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    return model.to(dtype)


def equal_to_trained(model: Any, dtype: torch.dtype) -> list[str]:
    """Names of tensors that differ from the trainer's, converted."""
    expected = dict([*trained().named_parameters(), *trained().named_buffers()])
    differ = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if not torch.equal(whole, expected[name].to(whole.dtype)):
            differ.append(name)
    return differ


# ------------------------------------------------------------------------------------------------------ whole updates


def update(
    address: str, directory: str, trainers: int, engines: int, parallel: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Two updates from `trainers` processes of one model to `engines` processes of another."""
    rank = int(os.environ["RANK"])
    training = rank < trainers
    if training:
        model = of("trainer", trainers, parallel, directory, trained())
        channel = connect(address, 0, engines + 1, timeout=TIMEOUT) if rank == 0 else None
        wanted = {n: dtype for n, t in model.named_parameters()}
        for _ in range(2):
            declared = manifest(model, wanted).with_canary(model)
            certificate = send_weights(model, channel, declared, bucket_bytes=SMALL_BUCKETS)
        found = {"certificate": certificate}
    else:
        os.environ["RANK"] = str(rank - trainers)
        model = of("engine", engines, parallel, directory, zeroed(tiny_model(), dtype))
        for _, buffer in model.named_buffers():
            buffer.data = buffer.data.float()
        receiver = WeightReceiver(model, "nothing has arrived yet")
        channel = connect(address, rank - trainers + 1, engines + 1, timeout=TIMEOUT)
        for _ in range(2):
            certificate = receive_weights(receiver, channel)
        found = {"certificate": certificate, "updates": receiver.updates, "refusal": receiver.refusal}
        found["differ"] = equal_to_trained(model, dtype)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return found


# -------------------------------------------------------------------------------------------------------------- faults


def swap_experts(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]] if name == EXPERTS else tensor


def transpose(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t() if name == SQUARE else tensor


def flip_one_bit(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == EXPERTS:
        tensor = tensor.clone()
        tensor.view(torch.int32).view(-1)[1234] ^= 1 << 3
    return tensor


def round_and_back(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float() if name == SQUARE else tensor


def on_the_wire(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """A `_send_bucket` that packs something else than what it was given."""

    def send_bucket(channel: Channel, bucket: list[Any], place: dict[str, int]) -> None:
        original(channel, [(entry, change(entry.name, tensor)) for entry, tensor in bucket], place)

    original = transport._send_bucket
    return send_bucket


WIRE_FAULTS = {
    "swapped experts": swap_experts,
    "transposed": transpose,
    "one bit": flip_one_bit,
    "rounded and back": round_and_back,
}


def parameters_only(model: Any) -> tuple[Manifest, WeightStream]:
    """What a trainer sends that knows of no buffers."""
    names = {name for name, _ in model.named_parameters()}
    declared = manifest(model)
    declared = replace(declared, entries=tuple(e for e in declared.entries if e.name in names))
    return declared, stream(model, declared)


def filtered(model: Any, keep: Callable[[str], bool]) -> tuple[Manifest, WeightStream]:
    declared = manifest(model)
    whole = stream(model, declared)
    return declared, WeightStream(((n, t) for n, t in whole if keep(n)), whole.checksums)


def rounded(model: Any) -> tuple[Manifest, WeightStream]:
    declared = manifest(model)
    whole = stream(model, declared)
    return declared, WeightStream(((n, t.bfloat16() if n == SQUARE else t) for n, t in whole), whole.checksums)


def stale(model: Any) -> tuple[Manifest, WeightStream]:
    """Whole and consistent, but not the weights that train."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        experts = other.get_parameter(EXPERTS)
        experts.copy_(swap_experts(EXPERTS, experts))
    declared = manifest(other).with_canary(model)
    return declared, stream(other, declared)


STREAM_FAULTS: dict[str, Callable[[Any], tuple[Manifest, WeightStream]]] = {
    "lost buffers": parameters_only,
    "lost bias": lambda model: filtered(model, lambda name: name != BIAS),
    "missing tensor": lambda model: filtered(model, lambda name: name != SQUARE),
    "rounded": rounded,
    "stale": stale,
}


def faults(address: str) -> dict[str, tuple[str, str | None]]:
    """Every fault, each followed by a good update: what was raised, and the refusal before the good one."""
    sending = os.environ["RANK"] == "0"
    channel = connect(address, 0 if sending else 1, 2, timeout=TIMEOUT)
    model = trained() if sending else zeroed(tiny_model())
    receiver = WeightReceiver(model)
    found = {}
    for fault in [*WIRE_FAULTS, *STREAM_FAULTS]:
        message = "nothing"
        try:
            send_fault(fault, model, channel) if sending else receive_weights(receiver, channel)
        except (ValueError, ConnectionError) as error:
            message = f"{type(error).__name__}: {error}"
        found[fault] = message, refusal(receiver)
        declared = manifest(model)
        send_weights(model, channel, declared) if sending else receive_weights(receiver, channel)
        assert refusal(receiver) is None
    return found


def refusal(receiver: WeightReceiver) -> str | None:
    """What a caller of the engine is told."""
    try:
        receiver.check()
    except ValueError as error:
        return str(error)
    return None


def send_fault(fault: str, model: Any, channel: Channel) -> None:
    original = transport._send_bucket
    if fault in WIRE_FAULTS:
        transport._send_bucket = on_the_wire(WIRE_FAULTS[fault])
        declared, items = manifest(model), None
    else:
        declared, items = STREAM_FAULTS[fault](model)
    try:
        send_weights(model, channel, declared, items, SMALL_BUCKETS)
    finally:
        transport._send_bucket = original


# --------------------------------------------------------------------------------------------------- dead and silent


def half_then(end: Callable[[], None], model: Any) -> tuple[Manifest, WeightStream]:
    declared = manifest(model)
    whole = stream(model, declared)

    def items() -> Tensors:
        for number, item in enumerate(whole):
            if number == len(declared.entries) // 2:
                end()
            yield item

    return declared, WeightStream(items(), whole.checksums)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def until_there(path: Path) -> None:
    give_up = time.monotonic() + TIMEOUT.total_seconds()
    while not path.exists():
        assert time.monotonic() < give_up, f"{path} never came"
        time.sleep(0.02)


def sender_ends(address: str, again: str, how: str, directory: str) -> dict[str, Any]:
    """The first process stops in the middle of an update; a third one then sends the engine a whole one. One that
    falls silent goes on when the engine has given it up.
    """
    rank, given_up = os.environ["RANK"], Path(directory) / "given_up"
    if rank == "0":
        model = trained()
        declared, items = half_then(die if how == "dies" else lambda: until_there(given_up), model)
        channel = connect(address, 0, 2, timeout=TIMEOUT)
        try:
            send_weights(model, channel, declared, items, SMALL_BUCKETS)
        except ConnectionError as error:
            return {"raised": str(error)}
    if rank == "1":
        receiver = WeightReceiver(zeroed(tiny_model()))
        channel = connect(address, 1, 2, timeout=TIMEOUT)
        if how == "falls silent":
            impatient_once_it_has_begun(receiver, channel)
        found: dict[str, Any] = {}
        try:
            receive_weights(receiver, channel)
        except ConnectionError as error:
            found["raised"] = str(error)
        found["refusal"] = refusal(receiver)
        given_up.touch()
        del channel  # the connection with it
        receive_weights(receiver, connect(again, 1, 2, timeout=TIMEOUT))
        return {**found, "after": refusal(receiver), "updates": receiver.updates}
    model = trained()
    send_weights(model, connect(again, 0, 2, timeout=TIMEOUT), manifest(model))
    return {}


def impatient_once_it_has_begun(receiver: WeightReceiver, channel: Channel) -> None:
    """Waits only seconds from the first tensor on: until then processes start, however long that takes."""
    write = receiver._write

    def write_and_hurry(name: str, tensor: torch.Tensor) -> None:
        channel.group.set_timeout(timedelta(seconds=3))
        receiver._write = write
        write(name, tensor)

    receiver._write = write_and_hurry


def receiver_dies(address: str, directory: str) -> dict[str, Any]:
    """The engine is killed in the middle of an update: both processes of the trainer hear of it."""
    rank = int(os.environ["RANK"])
    if rank == 2:
        channel = connect(address, 1, 2, timeout=TIMEOUT)
        receiver = WeightReceiver(zeroed(tiny_model()))
        write = receiver._write

        def write_some(name: str, tensor: torch.Tensor) -> None:
            die() if name == SQUARE else write(name, tensor)

        receiver._write = write_some
        receive_weights(receiver, channel)
    model = of("trainer", 2, {"ep": 2}, directory, trained())
    channel = connect(address, 0, 2, timeout=TIMEOUT) if rank == 0 else None
    try:
        send_weights(model, channel, manifest(model), bucket_bytes=SMALL_BUCKETS)
    except ConnectionError as error:
        return {"raised": str(error)}
    return {}


def one_wrong_shard(address: str, directory: str) -> dict[str, Any]:
    """What one of two processes of the engine keeps is spoilt once it has been written."""
    rank = int(os.environ["RANK"])
    channel = connect(address, rank, 3, timeout=TIMEOUT)
    try:
        if rank == 0:
            send_weights(trained(), channel, manifest(trained()))
        os.environ["RANK"] = str(rank - 1)
        receiver = WeightReceiver(of("engine", 2, {"ep": 2}, directory, zeroed(tiny_model())))
        write = receiver._write

        def write_and_spoil(name: str, tensor: torch.Tensor) -> None:
            write(name, tensor)
            if rank == 2 and name == EXPERTS:
                with torch.no_grad():
                    receiver._targets[name].to_local()[0, 0, 0] += 1

        receiver._write = write_and_spoil
        receive_weights(receiver, channel)
    except ValueError as error:
        return {"raised": str(error), "refusal": refusal(receiver) if rank else None}
    return {}
