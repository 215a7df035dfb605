"""Does the pipeline learn, and by which algorithms? Runs the tiny recipes for several seeds, reports held-out
accuracy.

Every seed has its own initial weights, training data, preference pairs, prompts and rollouts; the held-out questions
are the same for all. Prints a table, then one line `RESULT {json}` with the keys

    sft_accuracy dpo_accuracy grpo_accuracy   exact match on held-out prompts, 0 to 1, the worst over seeds
    gain                                      grpo minus sft, the smallest over seeds
    rises                                     whether every stage is above the one before, for every seed
    minutes                                   wall clock of the slowest seed's pipeline, export and report included
    seeds, quick                              what was run

`--algorithms grpo,gspo,ppo` trains each of them from the same SFT and DPO checkpoints, with all other keys of
recipes/tiny/grpo.yaml (ppo.yaml), and evaluates every 5 steps. `RESULT` then holds `algorithms`, for each name a list
over seeds of

    accuracy       exact match at the end, 0 to 1
    best           the highest of its evaluations
    steps_to_85    first evaluated step at or above 0.85, null if there is none
    seconds        wall clock of the stage, loading and evaluations included
    value_loss     of PPO: mean over the first and the last five steps
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from dots_align.config.algorithm import AlgorithmName

ROOT = Path(__file__).resolve().parents[1]
# A few steps of each stage: shows that the bench runs, learns nothing.
QUICK = (
    "sft.data.max_samples=240",
    "dpo.data.max_samples=32",
    "grpo.train.max_steps=2",
    "grpo.train.num_prompts_per_step=4",
    *(f"{stage}.evaluation.num_prompts=40" for stage in ("sft", "dpo", "grpo")),
)


def run_seed(seed: int, directory: Path, overrides: list[str]) -> dict[str, float]:
    """Runs the pipeline in a process of its own, as a user would; returns each stage's accuracy and the minutes."""
    started = time.monotonic()
    command = [sys.executable, "-m", "dots_align", "pipeline", "recipes/tiny/pipeline.yaml"]
    command += [f"output_dir={directory}", f"seed={seed}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True)
    minutes = (time.monotonic() - started) / 60
    record = json.loads((directory / "pipeline.json").read_text(encoding="utf-8"))
    return {stage["name"]: stage["metrics"]["exact_match"] for stage in record["stages"]} | {"minutes": minutes}


def command(stage: str, seed: int, directory: Path, *keys: str) -> float:
    """Runs a stage's tiny recipe in a process of its own; returns its seconds."""
    started = time.monotonic()
    arguments = [sys.executable, "-m", "dots_align", stage, f"recipes/tiny/{stage}.yaml"]
    arguments += [f"output_dir={directory}", f"seed={seed}", *keys]
    subprocess.run(arguments, cwd=ROOT, check=True)
    return time.monotonic() - started


def run_algorithms(names: list[str], seed: int, directory: Path, quick: bool, keys: list[str]) -> dict[str, Any]:
    """Trains each algorithm from one SFT and DPO; `keys` are overrides of the RL recipe."""
    few = [key.split(".", 1) for key in QUICK] if quick else []
    of = {stage: [key for name, key in few if name == stage] for stage in ("sft", "dpo", "grpo")}
    command("sft", seed, directory / "sft", *of["sft"])
    command("dpo", seed, directory / "dpo", f"model.path={directory / 'sft' / 'last'}", *of["dpo"])
    found = {}
    for name in names:
        stage = "ppo" if name == "ppo" else "grpo"
        run_dir = directory / name
        # The whole section, so that no key of the recipe's own algorithm is left.
        algorithm = [] if name in ("grpo", "ppo") else [f"algorithm={{name: {name}}}"]
        steps = ["save.save_steps=5", *(["critic.warmup_steps=1"] if quick and name == "ppo" else [])]
        start = f"model.path={directory / 'dpo' / 'last'}"
        seconds = command(stage, seed, run_dir, start, *algorithm, *steps, *of["grpo"], *keys)
        found[name] = learned(run_dir, stage) | {"seconds": round(seconds, 1)}
    return found


def learned(run_dir: Path, stage: str) -> dict[str, Any]:
    """What a run's metrics say about its learning."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(line["step"], line["eval/exact_match"]) for line in lines if "eval/exact_match" in line]
    losses = [line[f"{stage}/value_loss"] for line in lines if f"{stage}/value_loss" in line]
    found = {
        "accuracy": curve[-1][1],
        "best": max(value for _, value in curve),
        "steps_to_85": next((step for step, value in curve if value >= 0.85), None),
    }
    if losses:
        found["value_loss"] = [round(sum(part) / len(part), 4) for part in (losses[:5], losses[-5:])]
    return found


def compare(names: list[str], seeds: range, base: Path, quick: bool, keys: list[str]) -> None:
    results = [run_algorithms(names, seed, base / f"seed{seed}", quick, keys) for seed in seeds]
    print(f"\n{'algorithm':<30} {'accuracy':>24} {'steps to 85 %':>18} {'seconds':>18}")
    for name in names:
        rows = [found[name] for found in results]
        accuracy = " ".join(f"{row['accuracy']:7.1%}" for row in rows)
        steps = " ".join(f"{row['steps_to_85'] or '-':>5}" for row in rows)
        seconds = " ".join(f"{row['seconds']:5.0f}" for row in rows)
        print(f"{name:<30} {accuracy:>24} {steps:>18} {seconds:>18}")
    columns = {name: {key: [found[name][key] for found in results] for key in results[0][name]} for name in names}
    print("RESULT " + json.dumps({"algorithms": columns, "seeds": len(results), "quick": quick}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, counted from 0 (default 3)")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: under a minute on 2 cores")
    parser.add_argument("--output", type=Path, help="keep the runs here; a temporary directory if not given")
    parser.add_argument("--algorithms", help="comma-separated names of algorithms to compare, in place of the pipeline")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the pipeline (stage.key=value), or of all algorithms"
    )
    options = parser.parse_args()
    if options.algorithms:
        names = options.algorithms.split(",")
        if unknown := sorted(set(names) - set(get_args(AlgorithmName))):
            parser.error(f"--algorithms: no {', '.join(unknown)}; there are {', '.join(get_args(AlgorithmName))}")
        with tempfile.TemporaryDirectory() as scratch:
            base, seeds = options.output or Path(scratch), range(1 if options.quick else options.seeds)
            compare(names, seeds, base, options.quick, options.overrides)
        return
    overrides = [*(QUICK if options.quick else ()), *options.overrides]
    with tempfile.TemporaryDirectory() as scratch:
        base = options.output or Path(scratch)
        seeds = range(1 if options.quick else options.seeds)
        results = [run_seed(seed, base / f"seed{seed}", overrides) for seed in seeds]
    stages = ("sft", "dpo", "grpo")
    print(f"\n{'seed':>4} " + " ".join(f"{name:>7}" for name in (*stages, "minutes")))
    for seed, found in enumerate(results):
        print(f"{seed:>4} " + " ".join(f"{found[s]:7.1%}" for s in stages) + f" {found['minutes']:7.2f}")
    summary = {f"{stage}_accuracy": min(found[stage] for found in results) for stage in stages}
    summary["gain"] = round(min(found["grpo"] - found["sft"] for found in results), 4)
    summary["rises"] = all(found["sft"] < found["dpo"] < found["grpo"] for found in results)
    summary["minutes"] = round(max(found["minutes"] for found in results), 2)
    print("RESULT " + json.dumps({**summary, "seeds": len(results), "quick": options.quick}))


if __name__ == "__main__":
    main()
