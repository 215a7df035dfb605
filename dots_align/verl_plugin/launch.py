"""`launch.backend=verl`: writes verl's configuration beside the run, starts its trainer, and follows its logs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from dots_align.checkpoint import check_layout_of, encode_rollout_prompts, ensure_start, newest_whole, step_of
from dots_align.data.sources import load_prompts
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.publisher import Publisher
from dots_align.run_directory import open_run_directory
from dots_align.runtime import MetricsLog, logger, world_size
from dots_align.scoring.functions import load_function
from dots_align.types import Prompt
from dots_align.verl_plugin.follow import Follower
from dots_align.verl_plugin.mapping import LOADING, STRATEGY, check, verl_config

POLL_SECONDS = 1.0
EXTRA = ("transfer_queue", "cachetools")
# Starts a command that gets SIGTERM when this process ends, however it ends (PR_SET_PDEATHSIG).
BESIDE_US = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


def run(recipe: Any) -> Path:
    """Trains under verl and returns the last checkpoint's directory.

    Raises:
        ValueError: something in the recipe or on this machine does not allow it, or verl's trainer failed.
    """
    prompts = _check(recipe)
    hooks = resolve_hooks(recipe)
    run_dir = open_run_directory(recipe)
    start = ensure_start(recipe, run_dir)
    encode_rollout_prompts(start, prompts, recipe.rollout.max_tokens)  # Ray's processes would say it minutes later
    command = write_config(recipe, start, run_dir)
    publisher = Publisher(run_dir, recipe, "", hooks)
    resume = newest_whole(run_dir)
    log = MetricsLog(run_dir, step_of(resume) if resume else 0, recipe)
    if resume is not None:
        publisher.finish_hooks(resume, log)
    _resume_from(resume, run_dir.resolve() / "verl" / "checkpoints")
    code = _start(command, run_dir / "verl", Follower(run_dir, log, recipe, publisher))
    publisher.finish(log)
    if code != 0:
        raise ValueError(
            f"verl's trainer ended with status {code}; what it said is in {run_dir / 'verl' / 'log.txt'} (most likely "
            "the first error there is the cause)"
        )
    last = newest_whole(run_dir)
    assert last is not None, "verl saves at its last step"
    return last


def _check(recipe: Any) -> list[Prompt]:
    """What can be known before anything is made; the prompts."""
    if world_size() > 1:
        raise ValueError(
            "launch.backend=verl: Ray starts the processes itself; run this once, without accelerate or torchrun"
        )
    check(recipe)
    for reward in recipe.rewards:
        load_function(reward.function, "rewards.function")
    prompts = load_prompts(recipe.data, recipe.seed)
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise ValueError(
            f"launch.backend=verl: {', '.join(missing)} not installed; pip install -c constraints.txt -e '.[cluster]'"
        )
    check_layout_of(recipe, recipe.launch.num_nodes * recipe.launch.processes_per_node)
    if recipe.launch.ray_address is None:
        _check_this_machine(recipe.launch)
    else:
        _check_paths([recipe.data.path, *(reward.function for reward in recipe.rewards)])
    return prompts


def _check_this_machine(launch: Any) -> None:
    if launch.num_nodes > 1:
        raise ValueError(
            f"launch.num_nodes={launch.num_nodes}: start Ray on each node (ray start --head, then ray start --address) "
            "and give launch.ray_address=auto"
        )
    if 0 < torch.cuda.device_count() < launch.processes_per_node:
        raise ValueError(
            f"launch.processes_per_node={launch.processes_per_node}: there are {torch.cuda.device_count()} GPUs here; "
            "each process needs one"
        )


def _check_paths(places: list[str]) -> None:
    for place in places:
        if not os.path.isabs(place) and (os.path.exists(place) or ".py:" in place):
            raise ValueError(
                f"launch.ray_address: {place} is looked for where Ray was started, on every node; give its whole path"
            )


def write_config(recipe: Any, start: Any, run_dir: Path) -> list[str]:
    """Writes verl's configuration; returns the command that starts its trainer with it."""
    directory = (run_dir / "verl").resolve()
    config = verl_config(recipe, start, run_dir.resolve() / "run.json")
    if recipe.launch.ray_address is None and not torch.cuda.is_available():
        config["ray_kwargs"]["ray_init"]["num_gpus"] = recipe.launch.processes_per_node  # what verl counts processes in
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    agent_loop = [{"name": STRATEGY, "_target_": "dots_align.verl_plugin.agent_loop.SampleLoop"}]
    (directory / "agent_loop.yaml").write_text(yaml.safe_dump(agent_loop), encoding="utf-8")
    logger.info("verl's configuration: %s", directory / "config.yaml")
    quoted = str(directory).replace('"', '\\"')  # or Hydra takes a = or a space for its own
    hydra = ["hydra.output_subdir=null", f'hydra.run.dir="{quoted}"']
    options = ["--config-path", str(directory), "--config-name", "config"]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *options, *hydra]


def _resume_from(checkpoint: Path | None, saved: Path) -> None:
    """Has verl go on from the run's newest whole checkpoint. It notes a step before that is published, so a process
    that died in between leaves a note of weights that are half moved away, or not linked yet.
    """
    step, note = step_of(checkpoint) if checkpoint else 0, saved / "latest_checkpointed_iteration.txt"
    for later in saved.glob("global_step_*"):
        if int(later.name.rpartition("_")[2]) > step:
            shutil.rmtree(later)
    if checkpoint is None:
        note.unlink(missing_ok=True)
    elif (saved / f"global_step_{step}").is_dir():
        link = saved / f"global_step_{step}" / "actor"
        if not link.exists():
            link.symlink_to(checkpoint.resolve())
        note.write_text(str(step), encoding="utf-8")


def _start(command: list[str], directory: Path, follower: Follower) -> int:
    """Runs verl's trainer to its end, and passes on what it logs."""
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": LOADING,
        "VERL_FILE_LOGGER_PATH": str(follower.metrics),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    logger.info("%s (its output: %s)", " ".join(command), directory / "log.txt")
    with (directory / "log.txt").open("w", encoding="utf-8") as out:
        beside = [sys.executable, "-c", BESIDE_US, *command]
        child = subprocess.Popen(beside, env=environment, stdout=out, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that verl, and with it Ray, end as well
        try:
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                follower.read()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            follower.read()
    return child.returncode
