"""How much memory does a rank need to load and to export a sharded checkpoint, and how long does it take?

Several gloo processes share one model (ep = number of processes). Each fills its shards from a hub-layout checkpoint,
takes an optimizer step, saves weights and optimizer state, and loads both again. Peak memory is that of anonymous pages
(memory-mapped files are the system's cache) above what the rank held before. Prints a table, then one line
`RESULT {json}` with the keys

    model_mib                    fp32 weights of the whole model
    load_peak save_peak          worst rank's peak while loading or exporting weights, above its own shards, in MiB
    load_share save_share        the same including its shards, as a share of the whole model
    optimizer_save_peak optimizer_load_peak   for the optimizer's state, above what the rank holds, in MiB
    largest_tensor_mib           the largest single tensor (one layer's gate and up projections of all experts)
    seconds                      load, save, optimizer save, optimizer load, of the slowest rank
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dots_align.config import OptimSection, ParallelSection
from dots_align.model import optimizer as optimizer_files
from dots_align.model.dots1 import create_model, materialize, meta_model, preset_config
from dots_align.model.expert_parallel import shard_model
from dots_align.model.optimizer import load_optimizer, make_optimizer, save_optimizer
from dots_align.model.sharded_io import load_weights, save_weights

MIB = 2**20
ACTIONS = ("load", "save", "optimizer_save", "optimizer_load")


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; this bench needs Linux")


def measured(action: Callable[[], None]) -> tuple[float, float]:
    """(peak above the beginning in MiB, seconds)"""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    action()
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    return (max(peak, anonymous_bytes()) - before) / MIB, seconds


def worker(rank: int, world: int, port: int, directory: str, shard_mib: int, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = meta_model(Path(directory), "float32", "sdpa", "grouped")
    shard_model(model, ParallelSection(ep=world), None, "cpu")
    found = {}

    def load() -> None:
        materialize(model, torch.device("cpu"))
        load_weights(model, Path(directory))

    found["load"] = measured(load)
    out = Path(directory) / "out"
    found["save"] = measured(lambda: save_weights(model, out, max_shard_bytes=shard_mib * MIB))
    optimizer = make_optimizer(model.named_parameters(), OptimSection(), offload=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    names = dict(model.named_parameters())
    optimizer_files.MAX_FILE_BYTES = shard_mib * MIB
    found["optimizer_save"] = measured(lambda: save_optimizer(optimizer, names, out))
    found["optimizer_load"] = measured(lambda: load_optimizer(optimizer, names, out))
    dist.barrier()
    results.put(found)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="ranks, which is also ep (default 4)")
    parser.add_argument("--shard-mib", type=int, default=64, help="size of the exported files (default 64 MiB)")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model on 2 processes: under a minute on 2 cores"
    )
    options = parser.parse_args()
    shape = {"num_hidden_layers": 4, "n_routed_experts": 16} if options.quick else {"n_routed_experts": 64}
    world = 2 if options.quick else options.processes
    config = preset_config("small", **shape)
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        (Path(directory) / "out").mkdir()
        model = create_model(config, 0)
        total = sum(p.nbytes for p in model.parameters()) / MIB
        largest = max(p.nbytes for p in model.parameters()) / MIB
        model.save_pretrained(directory)
        del model
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        arguments = (world, port, directory, options.shard_mib, results)
        workers = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(world)]
        for process in workers:
            process.start()
        found = [results.get(timeout=600) for _ in workers]
        for process in workers:
            process.join()
    worst = {name: tuple(max(f[name][i] for f in found) for i in (0, 1)) for name in ACTIONS}
    share = total / world
    print(f"{world} processes, model {total:.0f} MiB in fp32, a rank's shards {share:.0f} MiB")
    print(f"{'':>16} {'peak MiB':>9} {'seconds':>8}")
    for name, (peak, seconds) in worst.items():
        print(f"{name:>16} {peak:>9.0f} {seconds:>8.1f}")
    summary = {
        "model_mib": round(total),
        "load_peak": round(max(worst["load"][0] - share, 0)),
        "save_peak": round(worst["save"][0]),
        "load_share": round(worst["load"][0] / total, 3),
        "save_share": round((worst["save"][0] + share) / total, 3),
        "optimizer_save_peak": round(worst["optimizer_save"][0]),
        "optimizer_load_peak": round(worst["optimizer_load"][0]),
        "largest_tensor_mib": round(largest, 1),
        "seconds": {name: round(worst[name][1], 2) for name in ACTIONS},
        "processes": world,
        "quick": options.quick,
    }
    print("RESULT " + json.dumps(summary))


if __name__ == "__main__":
    main()
