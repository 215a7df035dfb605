"""Does the pipeline learn? Runs recipes/tiny/pipeline.yaml for several seeds and reports held-out accuracy.

Every seed has its own initial weights, training data, preference pairs, prompts and rollouts; the held-out questions
are the same for all. Prints a table, then one line `RESULT {json}` with the keys

    sft_accuracy dpo_accuracy grpo_accuracy   exact match on held-out prompts, 0 to 1, the worst over seeds
    gain                                      grpo minus sft, the smallest over seeds
    rises                                     whether every stage is above the one before, for every seed
    minutes                                   wall clock of the slowest seed's pipeline, export and report included
    seeds, quick                              what was run
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, counted from 0 (default 3)")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: under a minute on 2 cores")
    parser.add_argument("--output", type=Path, help="keep the runs here; a temporary directory if not given")
    parser.add_argument("overrides", nargs="*", metavar="stage.key=value", help="passed on to the pipeline")
    options = parser.parse_args()
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
