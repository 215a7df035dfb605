"""Runs a function on several processes of one gloo group, forked from the server of tests/forked.py."""

from __future__ import annotations

import os
import queue
import random
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import forked
import torch.distributed as dist

TIMEOUT_SECONDS = 1800


def free_port() -> int:
    """One that nobody uses, and that the kernel gives nobody by itself: until whoever asked listens on it, other tests
    open hundreds of connections.
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := random.SystemRandom().randrange(20_000, 32_000)))
                return port
            except OSError:
                continue


def _worker(
    rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple, names: dict
) -> None:
    os.environ.clear()  # of whoever started the server
    os.environ.update(names)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the port is that of a store which `launch` keeps
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
    context = forked.context()
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = (world_size, store.port, results, function, arguments, dict(os.environ))
    workers = [context.Process(target=_worker, args=(rank, *given), daemon=True) for rank in range(world_size)]
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
