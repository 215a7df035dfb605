"""kill -9 in the middle, the same command again: the final weights equal those of the run that was left alone."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import QUICK_GRPO

SFT = (
    "data.max_samples=240",
    "train.max_steps=12",
    "train.max_length=512",
    "save.save_steps=4",
    "logging.logging_steps=1",
    "evaluation.num_prompts=8",
)
GRPO = (*QUICK_GRPO, "train.max_steps=6", "train.num_minibatches=2", "save.save_steps=2", "save.save_total_limit=null")
# Refills move the cursor in the prompts by other numbers in every step, and the coefficient of KL moves too.
PPO = (
    *GRPO,
    "algorithm.max_refill_rounds=2",
    "algorithm.kl_coef=0.1",
    "algorithm.kl_controller=adaptive",
    "critic.warmup_steps=1",
)


def steps_logged(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def run_to_the_end(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_after_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(steps_logged(run_dir), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "keys", "die_at", "last"), [("sft", SFT, 6, 12), ("grpo", GRPO, 3, 6), ("ppo", PPO, 3, 6)]
)
def test_killed_run_resumes_to_the_same_weights(
    spawn: Callable[..., subprocess.Popen[str]],
    recipe: Callable[[str], str],
    start: Path,
    tmp_path: Path,
    stage: str,
    keys: tuple[str, ...],
    die_at: int,
    last: int,
):
    own = (f"model.path={start}", "model.preset=null", *keys)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_the_end(spawn(stage, recipe(stage), f"output_dir={whole}", *own))
    process = spawn(stage, recipe(stage), f"output_dir={killed}", *own)
    kill_after_step(process, killed, die_at)
    assert not (killed / f"checkpoint-{last}").exists()
    # What a process leaves that dies while saving must not be taken for a checkpoint.
    (killed / f".checkpoint-{last}.staging").mkdir(exist_ok=True)
    output = run_to_the_end(spawn(stage, recipe(stage), f"output_dir={killed}", *own))
    assert "resuming from" in output
    for name in ("model.safetensors", "critic/model.safetensors") if stage == "ppo" else ("model.safetensors",):
        ours, theirs = (d / f"checkpoint-{last}" / name for d in (whole, killed))
        assert ours.read_bytes() == theirs.read_bytes()
    # Every step is in the log once, as in the run that was left alone.
    assert steps_logged(killed) == steps_logged(whole)
    losses = [
        [v for line in (d / "metrics.jsonl").read_text().splitlines() if (v := json.loads(line).get(f"{stage}/loss"))]
        for d in (whole, killed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("stage", "keys"), [("sft", (*SFT, "train.max_steps=2")), ("grpo", QUICK_GRPO)])
def test_a_finished_run_is_found_finished(
    recipe: Callable[[str], str], start: Path, tmp_path: Path, stage: str, keys: tuple[str, ...]
):
    from dots_align import cli

    run_dir = tmp_path / "run"
    command = [stage, recipe(stage), f"output_dir={run_dir}", f"model.path={start}", "model.preset=null", *keys]
    cli.main(command)
    weights = run_dir / "checkpoint-2" / "model.safetensors"
    before = (weights.stat().st_mtime_ns, (run_dir / "metrics.jsonl").read_text(), sorted(run_dir.glob("check*")))
    cli.main(command)
    after = (weights.stat().st_mtime_ns, (run_dir / "metrics.jsonl").read_text(), sorted(run_dir.glob("check*")))
    assert after == before
