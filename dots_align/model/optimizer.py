"""AdamW on each rank's own part of the parameters, and its state on disk, loadable on any number of ranks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from dots_align.config import OptimSection
from dots_align.model.experts import local
from dots_align.runtime import is_main_process, rank, world_size

STATE_TENSORS, STATE = "optimizer_state", "optimizer_state.json"
MAX_FILE_BYTES = 1 << 30


class ShardedAdamW(torch.optim.Optimizer):
    """torch's AdamW, computed on local parts, so that parameters may be sharded over different meshes.

    Args:
        params: parameters or parameter groups, as of any torch optimizer.
        offload: keep the moments and fp32 masters in host memory and do the step there; only gradients and new
            weights cross over.

    Parameters in a lower precision than fp32 get fp32 masters, which the step works on.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        offload: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.offload = offload

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "AdamW evaluates nothing again"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and local(p).numel()]
            states = [self.state_of(p) for p in parameters]
            masters = [s.get("master", local(p)) for s, p in zip(states, parameters, strict=True)]
            gradients = [local(p.grad).to(m.device, m.dtype) for p, m in zip(parameters, masters, strict=True)]
            if not parameters:
                continue
            adamw(
                masters,
                gradients,
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            for parameter, state in zip(parameters, states, strict=True):
                if "master" in state:
                    local(parameter).copy_(state["master"])

    @torch.no_grad()
    def state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """`exp_avg`, `exp_avg_sq` and, where there is one, `master`: fp32, of the local part; `step` counts updates."""
        state = self.state[parameter]
        if not state:
            part = local(parameter)
            home = torch.device("cpu") if self.offload else part.device
            pinned = self.offload and part.device.type == "cuda"
            make = {"dtype": torch.float32, "device": home, "pin_memory": pinned}
            if self.offload or part.dtype != torch.float32:
                state["master"] = torch.empty(part.shape, **make).copy_(part)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros(part.shape, **make) for _ in range(2))
            state["step"] = torch.zeros((), dtype=torch.float32, device=home)
        return state


def make_optimizer(named_parameters: Iterable[tuple[str, Any]], optim: OptimSection, offload: bool) -> ShardedAdamW:
    """Weight decay goes to matrices only, as transformers has it: norms and biases are left alone."""
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1]
    others = [p for name, p in trained if p.ndim <= 1]
    return ShardedAdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        offload=offload,
    )


def _global_view(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A part of the optimizer's state, told which part of the whole it is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _state_tensors(optimizer: ShardedAdamW, names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": _global_view(parameter, part)
        for name, parameter in names.items()
        for key, part in optimizer.state_of(parameter).items()
        if key != "step"
    }


def _files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Number of the file of each tensor. A rank's file is in memory as a whole when it is written, so none is large."""
    file, room, number_of = 1, MAX_FILE_BYTES * world_size(), {}
    for name, tensor in tensors.items():
        if number_of and tensor.nbytes > room:
            file, room = file + 1, MAX_FILE_BYTES * world_size()
        number_of[name] = file
        room -= tensor.nbytes
    return number_of


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What torch's distributed checkpoints warn of is meant, and what goes wrong in them (a disk that is full, Ctrl-C)
    is raised as what it is: they put it into an exception that is no `Exception`, so no handler sees it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            own = error.failures.get(rank()) or next(iter(error.failures.values()))
            raise own[0] from None


def save_optimizer(optimizer: ShardedAdamW, names: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Writes the state of the trained parameters, every rank its part, as safetensors; collective.

    Args:
        names: parameter of each name; the names have to be the same when it is loaded.
    """
    tensors = _state_tensors(optimizer, names)
    writer = HuggingFaceStorageWriter(str(directory / STATE_TENSORS), _files(tensors), save_distributed=True)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=world_size() == 1)
    if is_main_process():
        steps = {name: int(optimizer.state_of(parameter)["step"]) for name, parameter in names.items()}
        (directory / STATE).write_text(json.dumps({"steps": steps}))


def load_optimizer(optimizer: ShardedAdamW, names: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Restores what `save_optimizer` wrote, on any number of ranks and any layout; collective.

    Raises:
        ValueError: the state is of other parameters.
    """
    steps = json.loads((directory / STATE).read_text())["steps"]
    if steps.keys() != names.keys():
        odd = sorted(steps.keys() ^ names.keys())
        raise ValueError(f"{directory}: the optimizer state is of other parameters; {odd[0]} is not in both")
    with _plain_errors():
        dcp.load(
            _state_tensors(optimizer, names),
            storage_reader=HuggingFaceStorageReader(str(directory / STATE_TENSORS)),
            no_dist=world_size() == 1,
        )
    for name, parameter in names.items():
        optimizer.state_of(parameter)["step"].fill_(steps[name])
