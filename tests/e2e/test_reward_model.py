"""A reward model is trained on preferences, judged on held-out pairs, and teaches a policy."""

import json
from collections.abc import Callable
from pathlib import Path

from dots_align import cli
from tests.e2e.conftest import QUICK_GRPO

QUICK = (
    "data.max_samples=64",
    "train.per_device_train_batch_size=8",
    "optim.learning_rate=2.0e-3",
    "evaluation.num_pairs=32",
)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_preferences_become_a_reward(recipe: Callable[[str], str], start: Path, tmp_path: Path, fails):
    run_dir = tmp_path / "reward_model"
    cli.main(["reward_model", recipe("reward_model"), f"output_dir={run_dir}", f"model.path={start}", *QUICK])
    lines = metrics(run_dir)
    losses = [line["reward_model/loss"] for line in lines if "reward_model/loss" in line]
    assert len(losses) == 8
    assert abs(losses[0] - 0.693147) < 1e-5  # a head that knows nothing yet
    assert losses[-1] < 0.68
    assert {"reward_model/accuracy", "reward_model/margin"} <= set(lines[0])
    evaluation = json.loads((run_dir / "best" / "eval.json").read_text())
    assert evaluation["num_pairs"] == 32
    assert evaluation["metrics"]["accuracy"] == lines[-1]["eval/accuracy"] > 0.5
    manifest = json.loads((run_dir / "last" / "manifest.json").read_text())
    assert not [name for name in manifest["files"] if name.endswith((".pt", ".bin", ".pkl"))]
    grpo = tmp_path / "grpo"
    reward = {"function": "reward_models.preference:preference_score", "run_in": "trainer"}
    given = [f"rewards.0={json.dumps({**reward, 'arguments': {'checkpoint': str(run_dir / 'last')}})}"]
    own = [f"output_dir={grpo}", f"model.path={start}", *QUICK_GRPO, "on_save=[]", "train.max_steps=1"]
    cli.main(["grpo", recipe("grpo"), *own, *given])
    (line,) = metrics(grpo)
    assert line["grpo/reward_errors"] == 0
    scores = {json.loads(text)["reward"] for text in (grpo / "samples.jsonl").read_text().splitlines()}
    assert len(scores) > 1
    assert line["grpo/grad_norm"] > 0
    refused = fails("grpo", recipe("grpo"), *own, "overwrite=true", f"model.path={run_dir / 'last'}")
    assert "this is a reward model, which says how good an answer is and gives none" in refused


def test_an_adapter_run_goes_on_where_it_stopped(recipe: Callable[[str], str], start: Path, tmp_path: Path):
    lora = "lora={r: 4, lora_alpha: 8, target_parameters: [mlp.experts.down_proj]}"
    own = [f"model.path={start}", *QUICK, "data.max_samples=32", "save.save_steps=2", lora]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    cli.main(["reward_model", recipe("reward_model"), f"output_dir={whole}", *own])
    assert (whole / "last" / "eval.json").is_file()
    assert not (whole / "last" / "model.safetensors").exists()
    cli.main(["reward_model", recipe("reward_model"), f"output_dir={stopped}", *own])
    for name in ("last", "checkpoint-4"):
        path = stopped / name
        path.unlink() if path.is_symlink() else path.rename(tmp_path / "gone")
    cli.main(["reward_model", recipe("reward_model"), f"output_dir={stopped}", *own])
    ours, theirs = (d / "checkpoint-4" / "adapter_model.safetensors" for d in (whole, stopped))
    assert ours.read_bytes() == theirs.read_bytes()
