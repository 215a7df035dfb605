"""The real command line: in this process where that is enough, in a fresh one where the process is the point."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kill_points
import pytest
from forked import Forked

from dots_align import cli

QUICK_SFT = ("data.max_samples=200", "train.max_steps=3", "evaluation.num_prompts=8", "logging.logging_steps=1")
QUICK_GRPO = (
    "data.max_samples=16",
    "train.max_steps=2",
    "train.num_prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_tokens=12",
    "evaluation.num_prompts=8",
    "evaluation.max_tokens=12",
)


@pytest.fixture(scope="session")
def recipe(repo_root: Path) -> Callable[[str], str]:
    """The path of a recipe of the tiny set."""
    return lambda name: str(repo_root / "recipes" / "tiny" / f"{name}.yaml")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns the one message that a person sees."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in arguments])
        assert isinstance(stopped.value.code, str), f"exit status {stopped.value.code}"
        return stopped.value.code

    return run


@pytest.fixture(scope="session")
def start(recipe: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three steps of SFT on the synthetic data, with everything a stage leaves around it."""
    run_dir = tmp_path_factory.mktemp("start") / "sft"
    cli.main(["sft", recipe("sft"), f"output_dir={run_dir}", "save.save_steps=2", *QUICK_SFT])
    return run_dir / "last"


@pytest.fixture
def spawn(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """Starts a command in a process of its own; it is a copy of one that has imported everything already. With
    `dies_at` it ends itself with SIGKILL at the so manieth call of a point of kill_points.py.
    """
    started: list[Forked] = []

    def run(*arguments: Any, dies_at: tuple[str, int] | None = None) -> Forked:
        output = tmp_path_factory.mktemp("said") / "output.txt"
        point, call = dies_at or (None, 0)
        killed = (point, 0) if point else None
        started.append(Forked(kill_points.run, list(map(str, arguments)), killed, call, output=output, cwd=repo_root))
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def quick_bench(repo_root: Path) -> Callable[..., dict[str, Any]]:
    """Runs `scripts/<name>.py --quick …`, and returns what its RESULT line says."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, str(repo_root / "scripts" / f"{name}.py"), "--quick", *arguments]
        done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=3000, check=False)
        assert done.returncode == 0, done.stderr
        label, _, text = done.stdout.splitlines()[-1].partition(" ")
        found = json.loads(text)
        assert label == "RESULT"
        assert found["quick"] is True
        return found

    return run
