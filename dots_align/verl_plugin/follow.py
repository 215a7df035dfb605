"""verl's metrics as the run's own: under the names of the embedded loop where it has them, as `verl/…` otherwise."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from dots_align.checkpoint import checkpoints, step_of
from dots_align.config import GrpoRecipe, PpoRecipe
from dots_align.evals.publisher import Publisher
from dots_align.runtime import MetricsLog

NUM_SAMPLES_LOGGED = 8
NAMES = {
    "actor/loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "actor/entropy": "entropy",
    "actor/pg_clipfrac": "pg_clipfrac",
    "actor/pg_clipfrac_lower": "pg_clipfrac_lower",
    "actor/ppo_kl": "ppo_kl",
    "actor/kl_loss": "kl",
    "critic/vf_loss": "value_loss",
    "critic/vpred_mean": "value",
    "critic/vf_clipfrac": "value_clipfrac",
    "critic/grad_norm": "critic_grad_norm",
    "critic/lr": "critic_learning_rate",
    "critic/vf_explained_var": "value_explained",
    "timing_s/gen": "rollout_seconds",
    "critic/score/mean": "reward",
    "response_length/mean": "response_length",
}


class Follower:
    """Reads what verl's driver and the reward managers write, a step at a time, and sees to new checkpoints.

    Args:
        run_dir: the run's; verl's part of it is `verl/`. log: gets the steps. publisher: gets the checkpoints.
    """

    def __init__(self, run_dir: Path, log: MetricsLog, recipe: GrpoRecipe | PpoRecipe, publisher: Publisher) -> None:
        self.run_dir, self.directory, self.log, self.recipe = run_dir, run_dir / "verl", log, recipe
        directory, self.publisher = self.directory, publisher
        self.seen = {step_of(checkpoint) for checkpoint in checkpoints(run_dir)}
        self.metrics = directory / "metrics.jsonl"
        self.metrics.unlink(missing_ok=True)
        for old in (directory / "scored").glob("*.jsonl"):
            old.unlink()
        self.places: dict[Path, int] = {}
        self.scored: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def read(self) -> None:
        """Passes on the steps that have ended since the last call."""
        steps = self._new_lines(self.metrics)  # before the samples: those of a step are written first
        for path in sorted((self.directory / "scored").glob("*.jsonl")):
            for line in self._new_lines(path):
                self.scored[line["step"]].append(line)
        for line in steps:
            self._pass_on(line["step"], line["data"])
        for checkpoint in checkpoints(self.run_dir):
            if step_of(checkpoint) not in self.seen:
                self.seen.add(step_of(checkpoint))
                self.publisher.after_publish(checkpoint, self.log)

    def _new_lines(self, path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self.places.get(path, 0))
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self.places[path] = self.places.get(path, 0) + len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _pass_on(self, step: int, values: dict[str, Any]) -> None:
        stage = self.recipe.stage
        due = sorted(asked for asked in self.scored if asked <= step)  # samples count steps by when they were asked for
        scored = [line for asked in due for line in self.scored.pop(asked)]
        found = {f"{stage}/{NAMES[name]}": value for name, value in values.items() if name in NAMES}
        found |= {f"{stage}/{name}": value for name, value in _of_samples(scored).items()}
        found |= {f"verl/{name}": value for name, value in values.items() if name not in NAMES}
        numbers = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        self.log.log(step, numbers)
        shown: dict[str, dict[str, Any]] = {}
        for line in scored:
            shown.setdefault(line["prompt"], line)  # one for each prompt
        self.log.log_samples(
            step,
            [
                {key: value for key, value in line.items() if key not in ("step", "num_tokens")}
                for line in list(shown.values())[:NUM_SAMPLES_LOGGED]
            ],
        )


def _of_samples(scored: list[dict[str, Any]]) -> dict[str, float]:
    """Means over all that was sampled for a step."""
    if not scored:
        return {}
    count = len(scored)
    return {
        "reward": sum(line["reward"] for line in scored) / count,
        **{f"reward_{name}": sum(line["rewards"][name] for line in scored) / count for name in scored[0]["rewards"]},
        "response_length": sum(line["num_tokens"] for line in scored) / count,
        "stop_rate": sum(line["finish_reason"] == "stop" for line in scored) / count,
    }
