"""Runs a function on several processes of one gloo group, forked from one server that has the imports done already."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "dots_align.cli",
    "router_cases",
    "sharding_cases",
    "stage_cases",
    "sync_cases",
]
TIMEOUT_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(
    rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DOTS_ALIGN_DEVICE="cpu",
    )
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def launch(world_size: int, function: Callable[..., Any], *arguments: Any, dying: tuple[int, ...] = ()) -> list[Any]:
    """What `function(*arguments)` returned on each rank, None for those that are meant to die; raises with the first
    failing rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    port = free_port()
    workers = [
        context.Process(target=_worker, args=(rank, world_size, port, results, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = dict.fromkeys(dying)
    give_up = time.monotonic() + TIMEOUT_SECONDS
    try:
        while len(found) < world_size:
            try:
                rank, value, error = results.get(timeout=1)
            except queue.Empty:
                dead = [rank for rank, worker in enumerate(workers) if worker.exitcode and rank not in dying]
                assert not dead, f"ranks {dead} of {world_size} died without a word"
                assert time.monotonic() < give_up, (
                    f"no result after {TIMEOUT_SECONDS} s; ranks {sorted(found)} are done"
                )
                continue
            assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
            found[rank] = value
        for worker in workers:
            worker.join(30)
    finally:
        for worker in workers:
            worker.kill()
    return [found[rank] for rank in range(world_size)]
