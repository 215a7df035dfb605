"""Launching several processes for real: `accelerate launch`, `torchrun`, impossible layouts, a process that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.distributed.process_group import free_port

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "dots_align"]
QUICK = ("data.max_samples=40", "train.max_steps=2", "train.max_length=256", "evaluation.num_prompts=4")
# A process that dies ends the others at once, long before they would give up waiting for it (parallel.timeout_minutes).
STATED_SECONDS = 300


def accelerate() -> list[str]:
    """On a port that nobody is given while the launcher starts."""
    options = ["--config_file", "recipes/accelerate/cpu_2x.yaml", "--main_process_port", str(free_port())]
    return [str(BIN / "accelerate"), "launch", *options, "-m", "dots_align"]


@pytest.fixture
def start_launch(repo_root: Path) -> Callable[..., subprocess.Popen[str]]:
    def run(*command: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "DOTS_ALIGN_DEVICE": "cpu"}
        return subprocess.Popen(
            command, cwd=repo_root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return run


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # the last one may be half written
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
def test_two_processes_train_evaluate_and_publish(start_launch, recipe, tmp_path):
    """By accelerate; torchrun starts the run below, and one in the README."""
    run_dir = tmp_path / "sft"
    process = start_launch(*accelerate(), "sft", recipe("sft"), f"output_dir={run_dir}", *QUICK, "parallel.ep=2")
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    checkpoint = run_dir / "checkpoint-2"
    assert json.loads((checkpoint / "eval.json").read_text())["num_prompts"] == 4
    assert output.count("trains 3,061,120") == 1  # one process speaks
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert loaded.num_parameters() == 3_061_120
    assert not info["missing_keys"]


@pytest.mark.slow
def test_an_impossible_layout_is_refused_once_before_anything_is_made(start_launch, recipe, tmp_path):
    process = start_launch(*accelerate(), "sft", recipe("sft"), f"output_dir={tmp_path}/sft", *QUICK, "parallel.ep=3")
    output, _ = process.communicate(timeout=1800)
    assert process.returncode != 0
    told = "parallel.ep=3 times parallel.dp_replicate=1 does not divide the 2 processes"
    assert output.count(told) == 1, output
    assert not (tmp_path / "sft").exists()


def test_more_replicas_than_processes_are_refused_before_they_meet(fails, recipe, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():  # of a launch
        monkeypatch.setenv(name, value)
    message = fails("sft", recipe("sft"), f"output_dir={tmp_path}/sft", *QUICK, "parallel.dp_replicate=4")
    assert "does not divide the 2 processes" in message
    assert not (tmp_path / "sft").exists()


@pytest.mark.slow
def test_one_process_dying_ends_all_and_is_named(start_launch, recipe, tmp_path):
    run_dir = tmp_path / "sft"
    endless = ("train.num_train_epochs=1000", "train.max_steps=null", "on_save=[]", "logging.logging_steps=1")
    process = start_launch(*TORCHRUN, "sft", recipe("sft"), f"output_dir={run_dir}", *QUICK, *endless, "parallel.ep=2")
    try:
        give_up = time.monotonic() + 600
        while len(steps(run_dir)) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.2)
        victim = rank_process(process.pid, rank=1)
        os.kill(victim, signal.SIGKILL)
        died = time.monotonic()
        output, _ = process.communicate(timeout=STATED_SECONDS)
        print(f"all ended {time.monotonic() - died:.1f} s after one was killed")
    finally:
        process.kill()
    assert process.returncode != 0
    assert str(victim) in output
    assert "rank      : 1" in output, output


def rank_process(launcher: int, rank: int) -> int:
    """The process id of a rank among the children of a launcher."""
    children = psutil.Process(launcher).children()
    (found,) = [child.pid for child in children if child.environ().get("RANK") == str(rank)]
    return found
