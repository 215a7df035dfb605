"""kill -9 in the middle, the same command again: the final weights equal those of the run that was left alone."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_points
import pytest
from forked import Forked

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
# Prompts that wait for later steps, with their routes, and a batch that is made while the step before trains.
CARRIED = (
    *QUICK_GRPO,
    "train.max_steps=16",
    "train.num_minibatches=2",
    "train.off_policy_steps=1",
    "rollout.partial={chunk_tokens: 4, extra_prompts: 3, max_staleness: 3}",
    "rollout_correction.rollout_is=token",
    "router.replay=R3",
    "save.save_steps=2",
    "save.save_total_limit=null",
    "on_save=[]",
    "scoring.num_workers=1",
)
EVEN = "def even(response):\n    return sum(token % 2 == 0 for token in response.response_ids) / 12\n"


def steps_logged(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def run_to_the_end(process: Forked) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "keys", "saved", "last"), [("sft", SFT, 4, 12), ("ppo", PPO, 2, 6)])
def test_killed_run_resumes_to_the_same_weights(
    spawn: Callable[..., Forked],
    recipe: Callable[[str], str],
    start: Path,
    tmp_path: Path,
    stage: str,
    keys: tuple[str, ...],
    saved: int,
    last: int,
):
    own = (f"model.path={start}", "model.preset=null", *keys)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_the_end(spawn(stage, recipe(stage), f"output_dir={whole}", *own))
    # The evaluation of what it has saved is a line of the log, too.
    process = spawn(stage, recipe(stage), f"output_dir={killed}", *own, dies_at=("metrics", saved + 3))
    assert process.wait() == -signal.SIGKILL, process.said()
    assert saved < max(steps_logged(killed)) < 2 * saved
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


def log_without_times(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "time" and "seconds" not in name} for line in lines]


POINTS = {"rollout": (1, 40), "scoring": (2, 8), "update": (2, 6), "save": (3, 2)}
"""Of each phase in kill_points.py how many points there are, and the latest call drawn."""


@pytest.mark.slow
def test_a_run_killed_at_ten_random_points_comes_to_the_same_weights(
    recipe: Callable[[str], str], start: Path, tmp_path: Path, repo_root: Path
):
    """While sampling, scoring, updating, saving: killed by itself, so at that very point."""
    (tmp_path / "even.py").write_text(EVEN)
    whole, killed, output = tmp_path / "whole", tmp_path / "killed", tmp_path / "output.txt"
    keys = (f"model.path={start}", "model.preset=null", f"rewards.0.function={tmp_path / 'even.py'}:even", *CARRIED)

    def attempt(run_dir: Path, point: tuple[str, int] | None = None, call: int = 0) -> int:
        command = ["grpo", recipe("grpo"), f"output_dir={run_dir}", *keys]
        return Forked(kill_points.run, command, point, call, output=output, cwd=repo_root).wait()

    assert attempt(whole) == 0, output.read_text()
    rng = random.Random(4)
    phases = [*POINTS, *POINTS, *rng.choices(list(POINTS), k=2)]
    rng.shuffle(phases)
    reached = []
    for phase in phases:
        count, latest = POINTS[phase]
        point, call = (phase, rng.randrange(count)), rng.randint(1, latest)
        assert attempt(killed, point, call) == -signal.SIGKILL, f"{point} {call}\n{output.read_text()}"
        reached.append(max(steps_logged(killed), default=0))
        assert not (killed / "checkpoint-16").exists()
    assert len(set(reached)) > 3  # not all at the beginning
    assert attempt(killed) == 0, output.read_text()
    for name in ("model.safetensors", "loop_state.json", "rollouts.jsonl"):
        ours, theirs = (d / "checkpoint-16" / name for d in (whole, killed))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert (whole / "checkpoint-16" / "model.safetensors").read_bytes() != (start / "model.safetensors").read_bytes()
    assert log_without_times(killed) == (log := log_without_times(whole))
    assert (killed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    # What had to be kept was there: prompts in work, and samples of older policies.
    assert all(line["grpo/groups_carried"] == 3 for line in log)
    assert max(line["grpo/staleness_max"] for line in log) > 1
