"""Recipes inside verl's trainer, over a real Ray: two processes that share the experts learn what the embedded loop
does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dots_align import cli
from dots_align.checkpoint import load_model
from dots_align.config import ModelSection
from tests.distributed.stage_cases import assert_equal_with_a_seed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transfer_queue") is None, reason="the extra `cluster` is not installed"),
    pytest.mark.skipif(
        not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free < 1 << 28,
        reason="Ray's object store needs 256 MiB of /dev/shm",
    ),
]

MARK = "DOTS_ALIGN_TEST_RUN"
REWARD = "def share_of_digits(response):\n    return sum(c.isdigit() for c in response.text) / 12\n"
KEYS = (
    "train.num_prompts_per_step=4",
    "train.num_minibatches=1",
    "train.micro_batch_tokens=200",
    "rollout.group_size=4",
    "rollout.max_tokens=12",
    "data.max_samples=16",
    "save.save_steps=null",
    "optim.warmup_steps=0",
    "optim.adam_epsilon=1e-4",  # or Adam blows up the rounding of vanishing gradients
)


@pytest.fixture
def reward(tmp_path: Path) -> str:
    """One that random weights earn, unequally."""
    path = tmp_path / "digits.py"
    path.write_text(REWARD)
    return f'rewards=[{{"function": "{path}:share_of_digits"}}]'


@pytest.fixture
def under_verl(repo_root: Path) -> Iterator[Any]:
    """Runs a recipe with launch.backend=verl; nothing of it may be left afterwards."""
    mark = uuid4().hex

    def run(run_dir: Path, *arguments: str) -> str:
        path = os.pathsep.join([str(repo_root), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, MARK: mark}
        child = subprocess.Popen(
            [sys.executable, "-m", "dots_align", *arguments, f"output_dir={run_dir}"],
            cwd=repo_root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, _ = child.communicate(timeout=2400)
        log = run_dir / "verl" / "log.txt"
        assert child.returncode == 0, f"{said}\n{log.read_text()[-8000:] if log.is_file() else ''}"
        _, alive = psutil.wait_procs(started_with(mark), timeout=300)
        assert not alive, f"left running: {[process.cmdline() for process in alive]}"
        return said

    yield run
    for process in started_with(mark):
        process.kill()


def started_with(mark: str) -> list[psutil.Process]:
    """The processes that have inherited an environment with `mark` in it; Ray's leave their parent's session."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def texts_of(run_dir: Path, step: int) -> set[tuple[str, str]]:
    lines = map(json.loads, (run_dir / "samples.jsonl").read_text().splitlines())
    return {(line["prompt"], line["response"]) for line in lines if line["step"] == step}


def difference(one: Path, other: Path) -> float:
    """The largest, between the weights of two checkpoints."""
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_verl_without_the_plugin_says_so(repo_root: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("verl finds the GPU by itself")
    program = "import verl.workers.engine; import dots_align.verl_plugin.config"
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none", "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "verl started without dots_align's plugin" in done.stderr
    assert "verl.plugins" in done.stderr


@pytest.mark.skipif(
    not os.environ.get("DOTS_ALIGN_ALL_LAYOUTS"),
    reason="minutes; PPO below starts all that GRPO does (DOTS_ALIGN_ALL_LAYOUTS=1 runs both)",
)
def test_grpo_over_ray_learns_what_the_embedded_loop_does(
    under_verl: Any, start: Path, reward: str, tmp_path: Path, repo_root: Path
) -> None:
    keys = (*KEYS, reward, f"model.path={start}", "train.max_steps=2")
    said = under_verl(tmp_path / "verl", "grpo", str(repo_root / "recipes" / "verl" / "tiny_cpu_1x2.yaml"), *keys)
    assert str(tmp_path / "verl" / "verl" / "config.yaml") in said
    plain = ("launch.backend=embedded", "parallel.ep=1", f"output_dir={tmp_path / 'embedded'}")
    cli.main(["grpo", str(repo_root / "recipes" / "verl" / "tiny_cpu_1x2.yaml"), *keys, *plain])

    ours, theirs = metrics_of(tmp_path / "embedded"), metrics_of(tmp_path / "verl")
    assert [m["step"] for m in theirs] == [1, 2]
    for name in ("reward", "reward_share_of_digits", "response_length", "loss", "grad_norm", "learning_rate"):
        found, wanted = ([m[f"grpo/{name}"] for m in run] for run in (theirs, ours))
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6), name
    assert ours[0]["grpo/grad_norm"] > 0.01
    assert theirs[0]["verl/training/rollout_probs_diff_max"] < 1e-4
    assert all(m["verl/training/off_policy/trajectory_staleness_worst/max"] == 0 for m in theirs)
    for step in (1, 2):
        assert texts_of(tmp_path / "verl", step) == texts_of(tmp_path / "embedded", step)

    learned = [tmp_path / name / "checkpoint-2" for name in ("embedded", "verl")]
    assert difference(start, learned[0]) > 1e-4
    assert difference(*learned) < 1e-5
    assert (tmp_path / "verl" / "last").resolve() == learned[1]
    _, tokenizer = load_model(ModelSection(path=str(learned[1])))
    assert tokenizer.eos_token_id is not None
    cli.main(["report", str(tmp_path / "verl")])
    assert "share_of_digits" in (tmp_path / "verl" / "report.html").read_text()


def test_ppo_over_ray_learns_what_the_embedded_loop_does(
    under_verl: Any, recipe: Any, start: Path, reward: str, tmp_path: Path
) -> None:
    keys = (*KEYS, reward, f"model.path={start}", "train.max_steps=2", "critic.warmup_steps=1", "on_save=[]")
    keys = (*keys, "evaluation=null", "critic.optim.adam_epsilon=1e-4", "save.save_total_limit=1")
    launch = ("launch.backend=verl", "launch.processes_per_node=2", "launch.object_store_gib=0.1", "parallel.ep=2")

    def measure(seed: str) -> dict[str, float]:
        here = tmp_path / seed / "step=2"  # an equals sign is part of Hydra's grammar
        said = under_verl(here / "verl", "ppo", recipe("ppo"), *keys, seed, *launch)
        assert str(here / "verl" / "verl" / "config.yaml") in said
        cli.main(["ppo", recipe("ppo"), *keys, seed, f"output_dir={here / 'embedded'}"])

        ours, theirs = metrics_of(here / "embedded"), metrics_of(here / "verl")
        apart = {}
        for name in ("reward", "response_length", "value_loss", "critic_grad_norm", "critic_learning_rate"):
            found, wanted = ([m[f"ppo/{name}"] for m in run] for run in (theirs, ours))
            apart[name] = 0.0 if found == pytest.approx(wanted, rel=1e-3, abs=1e-6) else math.inf
        learned = [here / name / "checkpoint-2" for name in ("embedded", "verl")]
        assert difference(start, learned[0]) > 1e-4
        assert (here / "verl" / "last").resolve() == learned[1]
        apart["policy"], apart["critic"] = difference(*learned), difference(*(path / "critic" for path in learned))
        return apart

    assert_equal_with_a_seed(measure)
    run_dir = next(tmp_path.glob("seed=*")) / "step=2" / "verl"
    _, tokenizer = load_model(ModelSection(path=str(run_dir / "last")))
    assert tokenizer.eos_token_id is not None
    cli.main(["report", str(run_dir)])
    assert "share_of_digits" in (run_dir / "report.html").read_text()
    assert torch.is_tensor(load_file(run_dir / "last" / "critic" / "model.safetensors")["lm_head.weight"])
