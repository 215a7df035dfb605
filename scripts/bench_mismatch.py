"""Does a rollout engine that computes something else ruin the training, and what helps?

Trains the tiny GRPO recipe with rollouts sampled from a copy of the policy that is made wrong on purpose: after every
update the copy takes the policy's weights, and noise on top, as from an engine that quantises, routes or rounds in its
own way. The noise is fixed for a run: `--router-noise` on the weights of the routers, `--noise` on all other matrices,
both relative to the standard deviation of the weights. Four runs from the same checkpoint:

    right        no noise
    gate         noise, with the recipe's own gate (`mismatch.stop_above`): it has to stop before the first update
    plain        noise, gate off, nothing else
    corrected    noise, gate off, router.replay=R3 and rollout_correction.*

Prints the curves of held-out accuracy, a table, then one line `RESULT {json}` with the keys

    accuracy          exact match at the end, 0 to 1, of each run that ran
    best              the highest of its evaluations
    curve             [[step, accuracy], ...]
    kl, router_shift  mismatch of the first step: nats per token; share of the choices of experts that the trainer's
                      router, left to itself, would have made otherwise
    gate_fired        whether run `gate` was stopped before its first update
    quick             what was run
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dots_align.config import load_recipe
from dots_align.objectives.mismatch import MismatchError
from dots_align.rollout.engine import RolloutEngine
from dots_align.stages import grpo, loop

ROOT = Path(__file__).resolve().parents[1]
# Steps large enough that learning from the wrong samples shows: unhurried, the tiny model forgives a lot.
HURRY = ("optim.learning_rate=4.0e-4", "optim.lr_scheduler_type=constant")
CORRECTION = (
    "router.replay=R3",
    "rollout_correction.rollout_is=token",
    "rollout_correction.rollout_is_threshold=2.0",
)


class WrongEngine(RolloutEngine):
    """Samples from a copy of the policy with noise on its weights."""

    def __init__(self, policy: Any, rows: int, noise: float, router_noise: float) -> None:
        super().__init__(copy.deepcopy(policy).requires_grad_(False), rows)
        self.policy = policy
        generator = torch.Generator().manual_seed(0)
        self.noise = {
            name: torch.randn(weight.shape, generator=generator)
            * (router_noise if name.endswith("gate.weight") else noise)
            * weight.detach().std()
            for name, weight in policy.named_parameters()
            if weight.dim() > 1
        }

    def stream(self, *args: Any, **keys: Any) -> Iterator[Any]:
        self.take_weights()
        yield from super().stream(*args, **keys)

    @torch.no_grad()
    def take_weights(self) -> None:
        weights = dict(self.policy.named_parameters())
        for name, weight in self.model.named_parameters():
            weight.copy_(weights[name] + self.noise.get(name, 0.0))
        self.weights_changed()


def train(start: Path, run_dir: Path, noise: tuple[float, float] | None, keys: list[str]) -> dict[str, Any]:
    """One run of the GRPO recipe; what its metrics say."""
    recipe = load_recipe(ROOT / "recipes/tiny/grpo.yaml", [f"model.path={start}", f"output_dir={run_dir}", *keys])

    def wrong(rollout: Any, policy: Any) -> RolloutEngine:
        return WrongEngine(policy, rollout.max_num_sequences, *(noise or (0.0, 0.0)))

    stopped = False
    with patch.object(loop, "make_backend", wrong) if noise else contextlib.nullcontext():
        try:
            grpo.run(recipe)
        except MismatchError as error:
            stopped = True
            print(f"stopped: {error}")
    metrics = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    curve = [(line["step"], line["eval/exact_match"]) for line in lines if "eval/exact_match" in line]
    first = next((line for line in lines if "grpo/mismatch_kl" in line), {})
    return {
        "stopped": stopped,
        "curve": curve,
        "kl": first.get("grpo/mismatch_kl"),
        "router_shift": first.get("grpo/mismatch_router_shift"),
        "rewards": [line["grpo/reward"] for line in lines if "grpo/reward" in line],
    }


def make_start(directory: Path, seed: int, quick: bool) -> Path:
    """The checkpoint all runs start from: the tiny recipes of SFT."""
    few = ["data.max_samples=240", "evaluation.num_prompts=40"] if quick else []
    command = [sys.executable, "-m", "dots_align", "sft", "recipes/tiny/sft.yaml", f"output_dir={directory}"]
    subprocess.run([*command, f"seed={seed}", *few], cwd=ROOT, check=True)
    return directory / "last"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, help="checkpoint to start from; made by the tiny SFT recipe if not given")
    parser.add_argument("--noise", type=float, default=0.35, help="on every matrix but the routers' (default 0.35)")
    parser.add_argument("--router-noise", type=float, default=10.0, help="on the routers' weights (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="right,gate,plain,corrected", help="which of them, comma-separated")
    parser.add_argument("--quick", action="store_true", help="a few steps: under a minute on 2 cores")
    parser.add_argument("--output", type=Path, help="keep the runs here; a temporary directory if not given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the GRPO recipe, for all runs")
    options = parser.parse_args()
    noise = (options.noise, options.router_noise)
    quick = ["train.max_steps=2", "train.num_prompts_per_step=4", "rollout.max_tokens=16"]
    quick += ["evaluation.num_prompts=40", "evaluation.max_tokens=16", "save.save_steps=1"]
    # A model that knows nothing yet has no right answers to learn from, and says much the same under noise.
    quick += ["rewards=[{function: reward_models.length:repetition, arguments: {n: 1, free_share: 0.0}}]"]
    quick += ["mismatch.stop_above=0.01"]
    keys = [f"seed={options.seed}", "save.save_steps=5", *HURRY, *options.overrides, *(quick if options.quick else [])]
    runs: dict[str, tuple[tuple[float, float] | None, list[str]]] = {
        "right": (None, []),
        "gate": (noise, []),
        "plain": (noise, ["mismatch.stop_above=null"]),
        "corrected": (noise, ["mismatch.stop_above=null", *CORRECTION]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        base = options.output or Path(scratch)
        start = options.start or make_start(base / "sft", options.seed, options.quick)
        found = {n: train(start, base / n, runs[n][0], [*keys, *runs[n][1]]) for n in options.runs.split(",")}
    show(found)
    learned = {name: run for name, run in found.items() if run["curve"]}
    result = {
        "accuracy": {name: run["curve"][-1][1] for name, run in learned.items()},
        "best": {name: max(value for _, value in run["curve"]) for name, run in learned.items()},
        "curve": {name: run["curve"] for name, run in learned.items()},
        "kl": {name: run["kl"] for name, run in learned.items()},
        "router_shift": {name: run["router_shift"] for name, run in learned.items()},
        "gate_fired": found["gate"]["stopped"] and not found["gate"]["curve"] if "gate" in found else None,
        "quick": options.quick,
    }
    print("RESULT " + json.dumps(result))


def show(found: dict[str, dict[str, Any]]) -> None:
    steps = sorted({step for run in found.values() for step, _ in run["curve"]})
    print(f"\n{'exact match after step':<24}" + " ".join(f"{step:>6}" for step in steps) + "   KL   shift")
    for name, run in found.items():
        curve = dict(run["curve"])
        row = " ".join(f"{curve[step]:6.1%}" if step in curve else f"{'':>6}" for step in steps)
        numbers = " ".join("-" if run[key] is None else f"{run[key]:.3g}" for key in ("kl", "router_shift"))
        print(f"{name:<24}{'stopped by the gate' if run['stopped'] else row}   {numbers}")


if __name__ == "__main__":
    main()
