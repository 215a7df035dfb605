"""What has to be there before verl starts: verl loads this module, in every process, in the middle of its own import.

It does so by the entry point `verl.plugins`, whose failures verl does not tell, and by VERL_USE_EXTERNAL_MODULES,
which `launch` sets and whose failures end the process. `require` is for what runs later: it ends a run that would go on
without the plugin.
"""

from __future__ import annotations

import inspect
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import verl
from verl.plugin.platform import PlatformRegistry, get_platform

from dots_align.verl_plugin.cpu import CpuPlatform
from dots_align.verl_plugin.mapping import LOADING

SUPPORTED = "0.9.1"


def _check_version() -> None:
    if verl.__version__ != SUPPORTED:
        raise RuntimeError(
            f"verl {verl.__version__} is installed, and dots_align's plugin was made for {SUPPORTED}: install "
            f"verl=={SUPPORTED} (pip install -c constraints.txt -e '.[cluster]'), or run the recipe with "
            "launch.backend=embedded"
        )


def _start_processes(timeout_second: int | None = None, backend: str | None = None) -> None:
    """verl's, for a CPU: its own asks torch for `cpu:gloo,cpu:gloo`, which torch refuses."""
    if dist.is_initialized():
        return
    timeout = None if timeout_second is None else timedelta(seconds=timeout_second)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dist.init_process_group(backend or "gloo", rank=rank, world_size=world, timeout=timeout)


def _patch_process_group() -> None:
    """To go when verl's `initialize_global_process_group_ray` can be used where the device is the CPU."""
    from verl.utils import distributed

    theirs: Any = distributed.initialize_global_process_group_ray
    if theirs is _start_processes:
        return
    if list(inspect.signature(theirs).parameters) != list(inspect.signature(_start_processes).parameters):
        raise RuntimeError(
            f"verl {verl.__version__} starts process groups in another way than {SUPPORTED}, which dots_align's plugin "
            f"replaces on CPUs: install verl=={SUPPORTED} (constraints.txt)"
        )
    distributed.initialize_global_process_group_ray = _start_processes


def _load() -> None:
    _check_version()
    PlatformRegistry.register(platform="cpu")(CpuPlatform)
    if get_platform().device_name == "cpu":
        _patch_process_group()


def require() -> None:
    """Raises RuntimeError if verl settled on its device before this plugin was there."""
    platform = get_platform()
    if platform.device_name == "cuda" and not platform.is_platform_available(use_smi_check=True):
        raise RuntimeError(
            "verl started without dots_align's plugin, and takes this machine without GPUs for one with: install "
            "dots_align in this environment (pip install -e '.[cluster]'), so that verl finds its entry point "
            f"`verl.plugins`, or set VERL_USE_EXTERNAL_MODULES={LOADING} in every process; and check "
            "VERL_USE_EXTERNAL_PLUGINS, which can switch plugins off"
        )
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ and platform.device_name != name:
        raise RuntimeError(
            f"verl runs on {platform.device_name} here, but what this worker has is {name}: give Ray the GPUs of this "
            "node (ray start --num-gpus), or set VERL_PLATFORM=cpu in every process to train on CPUs"
        )


_load()
