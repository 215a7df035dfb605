"""What the launcher of verl's trainer sees to while it follows it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ends, is_alive

from dots_align.checkpoint import newest_whole, staged
from dots_align.config import GrpoRecipe, HookSection
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.publisher import Publisher
from dots_align.runtime import MetricsLog
from dots_align.verl_plugin.follow import Follower
from dots_align.verl_plugin.launch import _resume_from, _start
from dots_align.verl_plugin.mapping import refusals


def test_hooks_run_beside_verls_trainer(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks.py"
    hooks.write_text("def step(checkpoint, recipe):\n    return {'eval/x': float(checkpoint.name.split('-')[1])}\n")
    recipe = GrpoRecipe.model_validate(
        {
            "stage": "grpo",
            "output_dir": str(tmp_path / "run"),
            "data": {"path": "synthetic:prompts"},
            "rewards": [{"function": "a:b"}],
            "on_save": [f"{hooks}:step", {"hook": "keep_best", "metric": "eval/x"}],
            "launch": {"backend": "verl"},
        }
    )
    assert not list(refusals(recipe))
    for section, told in (("evaluate", "give `evaluate` in: process"), ("stop_early", "cannot end verl's trainer")):
        other = recipe.model_copy(update={"on_save": (HookSection(hook=section),)})
        assert told in next(refusals(other))
    (tmp_path / "run" / "verl").mkdir(parents=True)
    log = MetricsLog(tmp_path / "run")
    publisher = Publisher(tmp_path / "run", recipe, "", resolve_hooks(recipe))
    follower = Follower(tmp_path / "run", log, recipe, publisher)
    with staged(tmp_path / "run" / "checkpoint-2", {"stage": "grpo", "step": 2}) as staging:
        (staging / "config.json").write_text("{}")
    follower.read()
    publisher.finish(log)
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (line["step"], line["eval/x"]) == (2, 2.0)
    assert (tmp_path / "run" / "best").resolve().name == "checkpoint-2"


@pytest.mark.parametrize("published", [False, True])
def test_verl_goes_on_from_the_newest_whole_checkpoint_wherever_it_was_killed(tmp_path: Path, published: bool) -> None:
    """Its note of step 4 is there, and the weights are moved away; they are not published yet, or not linked yet."""
    saved, whole = tmp_path / "verl" / "checkpoints", {}
    for step in (2, 4):
        (saved / f"global_step_{step}").mkdir(parents=True)
        if step == 2 or published:
            whole[step] = tmp_path / f"checkpoint-{step}"
            with staged(whole[step], {"stage": "grpo", "step": step}) as staging:
                (staging / "config.json").write_text("{}")
    (saved / "global_step_2" / "actor").symlink_to(whole[2])
    (saved / "latest_checkpointed_iteration.txt").write_text("4")
    newest = newest_whole(tmp_path)
    _resume_from(newest, saved)
    assert newest == whole[max(whole)]
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(max(whole))
    assert {path.name: (path / "actor").resolve() for path in saved.glob("global*")} == {
        f"global_step_{step}": path for step, path in whole.items()
    }
    _resume_from(None, saved)
    assert list(saved.iterdir()) == []


def test_the_trainer_ends_with_its_launcher_even_if_that_is_killed(tmp_path: Path) -> None:
    """Or the same command, given again, would train in the same directory beside it."""
    told = tmp_path / "process"
    command = ["/bin/sh", "-c", f"echo $$ > {told}.tmp; mv {told}.tmp {told}; exec sleep 600"]
    follower: Any = SimpleNamespace(metrics=tmp_path / "metrics.jsonl", read=lambda: None)
    if not (launcher := os.fork()):
        try:
            _start(command, tmp_path, follower)
        finally:
            os._exit(1)
    _wait_for(told.is_file)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    trainer = int(told.read_text())
    try:
        assert ends(trainer)
    finally:
        if is_alive(trainer):
            os.kill(trainer, signal.SIGKILL)


def _wait_for(condition: Any) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
