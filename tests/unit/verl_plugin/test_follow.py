"""What the launcher of verl's trainer sees to while it follows it."""

from __future__ import annotations

import json
from pathlib import Path

from dots_align.checkpoint import staged
from dots_align.config import GrpoRecipe, HookSection
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.publisher import Publisher
from dots_align.runtime import MetricsLog
from dots_align.verl_plugin.follow import Follower
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
