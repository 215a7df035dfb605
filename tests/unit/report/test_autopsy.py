"""Runs that went wrong in known ways, as files: each cause is named with its evidence, and good runs have none."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dots_align.report.collect import collect
from dots_align.report.evidence import Finding
from dots_align.report.stage import Stage

STEPS, BAD = 60, 30
RECIPE = {
    "rollout": {"group_size": 8, "max_tokens": 256},
    "train": {"num_prompts_per_step": 32},
    "rewards": [{"function": "reward_models.math:boxed_answer"}],
}
Line = dict[str, float]


def good_step(step: int, rng: random.Random) -> Line:
    """What GRPO logs while it learns, with the noise it has."""
    learned = 1 - math.exp(-step / 20)
    reward = 0.3 + 0.6 * learned + rng.uniform(-0.03, 0.03)
    return {
        "reward": reward,
        "reward_errors": 0.0,
        "response_length": 60 + 15 * learned + rng.uniform(-2, 2),
        "stop_rate": 0.99,
        "entropy": 0.5 - 0.3 * learned,
        "grad_norm": rng.uniform(0.1, 0.3),
        "pg_clipfrac": rng.uniform(0, 0.01),
        "ppo_kl": 1e-4,
        "mismatch_kl": rng.uniform(1e-4, 1e-3),  # as bf16 has it
        "mismatch_mean": rng.uniform(0.005, 0.015),
        "mismatch_router_shift": rng.uniform(0.001, 0.005),
        "router_entropy": 0.65 - 0.05 * learned,
        "router_max_violation": 9.0,
    }


def sample(step: int, rng: random.Random) -> dict[str, Any]:
    a, b = rng.randrange(10, 99), rng.randrange(10, 99)
    right = rng.random() < 0.6
    answer = str(a + b)
    response = rf"{a}+{b}: \boxed{{{a + b if right else a + b + 10}}}"
    score = float(right)
    texts = {"prompt": f"What is {a} plus {b}?", "response": response, "answer": answer, "finish_reason": "stop"}
    return {"step": step, **texts, "reward": score, "rewards": {"boxed_answer": score}}


def write_run(
    directory: Path,
    change: Callable[[int, Line], None] = lambda step, line: None,
    change_sample: Callable[[int, dict[str, Any]], None] = lambda step, record: None,
    kind: str = "grpo",
    base: Callable[[int, random.Random], Line] = good_step,
    **recipe: Any,
) -> Stage:
    """A run of STEPS steps as files, then what the report makes of it."""
    rng = random.Random(5)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"stage": kind, "recipe": {**RECIPE, **recipe}}))
    metrics, samples = [], []
    for step in range(1, STEPS + 1):
        line = base(step, rng)
        change(step, line)
        if "reward" in line:  # groups of 8 answers that are all right or all wrong
            alike = line["reward"] ** 8 + (1 - line["reward"]) ** 8
            line.setdefault("zero_variance_groups", 32 * min(1.0, alike + 0.2))
        metrics.append({"step": step, "time": 1.0 * step, **{f"{kind}/{name}": value for name, value in line.items()}})
        for _ in range(4):
            record = sample(step, rng)
            change_sample(step, record)
            samples.append(record)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (directory / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in samples))
    (stage,) = collect([directory]).runs[0].stages
    return stage


def from_bad_on(**values: Callable[[int, float], float]) -> Callable[[int, Line], None]:
    """Changes metrics from step BAD on, given how many steps ago that was and what they would have been."""

    def change(step: int, line: Line) -> None:
        if step >= BAD:
            line.update({name: value(step - BAD, line[name]) for name, value in values.items()})

    return change


def falling(ago: int, value: float) -> float:
    return max(0.05, value - 0.04 * ago)


def likely(stage: Stage) -> Finding:
    assert stage.findings, "no cause was found"
    return stage.findings[0]


def test_a_run_that_learns_has_no_findings(tmp_path: Path) -> None:
    stage = write_run(tmp_path)
    assert (stage.outcome.verdict, stage.findings) == ("better", [])


def test_a_run_that_learns_to_think_longer_has_no_findings(tmp_path: Path) -> None:
    stage = write_run(tmp_path, from_bad_on(response_length=lambda ago, value: value * (1 + ago / 20)))
    assert stage.findings == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_collapse(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)

    def flat(step: int, line: Line) -> None:
        line["reward"] = 0.5 + rng.gauss(0, 0.08)
        line["zero_variance_groups"] = 5.0

    assert write_run(tmp_path, flat).findings == []


def test_failing_graders(tmp_path: Path) -> None:
    stage = write_run(tmp_path, from_bad_on(reward_errors=lambda ago, _: 200.0, reward=lambda ago, _: 0.1))
    found = likely(stage)
    assert (found.cause, found.title, found.first_step) == ("grader", "The grader fails", BAD)
    assert "6,200 reward calls failed" in found.evidence[0]
    assert "up to 78%" in found.evidence[0]
    assert "the reward went from 0.7" in found.evidence[-1]
    assert found.series == ["grpo/reward_errors"]


def test_a_single_failed_call_is_no_cause(tmp_path: Path) -> None:
    assert write_run(tmp_path, from_bad_on(reward_errors=lambda ago, _: float(ago == 3))).findings == []


def test_a_grader_that_rejects_right_answers(tmp_path: Path) -> None:
    def deaf(step: int, record: dict[str, Any]) -> None:
        if step >= BAD:
            record["reward"], record["rewards"] = 0.0, {"boxed_answer": 0.0}

    found = likely(write_run(tmp_path, from_bad_on(reward=lambda ago, _: 0.0), deaf))
    assert (found.cause, found.title) == ("grader", "The grader rejects right answers")
    assert found.first_step == BAD
    assert "end with the reference answer" in found.evidence[0]
    assert "the reference is “" in found.evidence[1]


def test_mismatch(tmp_path: Path) -> None:
    change = from_bad_on(mismatch_kl=lambda ago, _: 0.01 * (1 + ago), reward=falling)
    found = likely(write_run(tmp_path, change))
    assert (found.cause, found.first_step) == ("mismatch", BAD)
    assert "mismatch_kl reaches 0.31 nats from step 30 on" in found.evidence[0]
    assert "the reward went from" in found.evidence[-1]


def test_a_run_that_its_gate_stopped(tmp_path: Path) -> None:
    def last(step: int, line: Line) -> None:
        if step == STEPS:
            line.update(mismatch_max=0.9, mismatch_router_shift=0.25)
        else:
            line["mismatch_max"] = 0.01

    gate = {"stop_above": 0.5, "measure": "max"}
    found = likely(write_run(tmp_path, last, mismatch=gate))
    assert (found.cause, found.first_step) == ("mismatch", STEPS)
    assert "stopped at step 60: mismatch_max was 0.9, above mismatch.stop_above=0.5 (before: 0.01)" in found.evidence[0]
    assert found.evidence[1] == "25.0% of the experts chosen differ"


def test_router_shift_comes_before_the_mismatch_it_causes(tmp_path: Path) -> None:
    change = from_bad_on(
        mismatch_router_shift=lambda ago, _: 0.3, mismatch_kl=lambda ago, _: 0.05, reward=lambda ago, _: 0.1
    )
    stage = write_run(tmp_path, change)
    assert [finding.cause for finding in stage.findings] == ["router_shift", "mismatch"]
    assert "up to 30.0% of the experts" in stage.findings[0].evidence[0]


def test_a_router_that_collapses(tmp_path: Path) -> None:
    change = from_bad_on(
        router_entropy=lambda ago, value: max(0.05, value - 0.05 * ago), router_max_violation=lambda ago, _: 25.0
    )
    found = likely(write_run(tmp_path, change))
    assert (found.cause, found.title) == ("router_shift", "The router collapses")
    assert found.evidence[0] == "the entropy of the expert load fell from 0.64 to 0.05 (1 = even)"
    assert "max violation went from 9.0 to 25.0" in found.evidence


def test_length_explosion(tmp_path: Path) -> None:
    change = from_bad_on(
        response_length=lambda ago, value: min(250.0, value + 12 * ago),
        stop_rate=lambda ago, value: max(0.2, value - 0.05 * ago),
        reward=falling,
    )
    found = likely(write_run(tmp_path, change))
    assert (found.cause, found.title) == ("length", "Answers explode in length")
    assert "to 250 tokens (of at most 256)" in found.evidence[0]
    assert found.evidence[1] == "the share that ends by itself fell from 99% to 20%"
    assert BAD <= (found.first_step or 0) <= BAD + 6


@pytest.mark.parametrize(("level", "said"), [(0.0, "mostly all wrong"), (1.0, "all right")])
def test_groups_without_variance(tmp_path: Path, level: float, said: str) -> None:
    def silent(step: int, line: Line) -> None:
        line.update(reward=level, zero_variance_groups=32.0)

    def same(step: int, record: dict[str, Any]) -> None:
        record.update(reward=level, rewards={"boxed_answer": level}, response=record["answer"] if level else "?")

    stage = write_run(tmp_path, silent, same)
    found = likely(stage)
    assert stage.outcome.verdict == "flat"
    assert (found.cause, found.first_step) == ("zero_variance", 1)
    assert "in 100% of groups" in found.evidence[0]
    assert said in found.evidence[0]


def test_numbers_that_run_off(tmp_path: Path) -> None:
    change = from_bad_on(
        loss=lambda ago, _: math.nan, grad_norm=lambda ago, value: 50.0 if ago < 1 else math.nan, reward=falling
    )

    def with_loss(step: int, line: Line) -> None:
        line["loss"] = 0.1
        change(step, line)
        if step == BAD - 1:
            line["grad_norm"] = 40.0

    stage = write_run(tmp_path, with_loss)
    assert stage.outcome.verdict == "broken"
    assert (likely(stage).cause, likely(stage).first_step) == ("numbers", BAD)
    assert "grpo/loss is not a finite number at step 30" in likely(stage).evidence
    assert "the gradient norm before that was 40" in likely(stage).evidence[-1]


def test_updates_that_are_too_large(tmp_path: Path) -> None:
    change = from_bad_on(pg_clipfrac=lambda ago, _: 0.5, grad_norm=lambda ago, _: 30.0, reward=falling)
    found = likely(write_run(tmp_path, change))
    assert found.cause == "step_size"
    assert "50% of tokens are clipped (from step 30 on)" in found.evidence


def test_contradicting_and_missing_answers(tmp_path: Path) -> None:
    number = iter(range(10_000))

    def torn(step: int, record: dict[str, Any]) -> None:
        index = next(number)
        record.update(prompt=f"question {index % 20}", answer="" if index % 4 == 0 else str(index))

    found = likely(write_run(tmp_path, change_sample=torn))
    assert found.cause == "data"
    assert found.evidence[0] == "60 of 240 logged prompts (25%) have no reference answer"
    assert "15 of 20 logged prompts have contradicting reference answers" in found.evidence[1]


def test_one_prompt_over_and_over(tmp_path: Path) -> None:
    def same(step: int, record: dict[str, Any]) -> None:
        record.update(prompt="Hi!", answer="42")

    found = likely(write_run(tmp_path, from_bad_on(reward=falling), same))
    assert found.cause == "data"
    assert "one prompt makes up 100% of the logged ones: “Hi!”" in found.evidence


def supervised(step: int, rng: random.Random) -> Line:
    return {"loss": 0.2 + 4 * math.exp(-step / 15) + rng.uniform(-0.02, 0.02), "grad_norm": rng.uniform(0.5, 1)}


def test_bad_batches_of_a_supervised_run(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", kind="sft", base=supervised)
    assert (good.outcome.verdict, good.findings) == ("better", [])

    def batch(step: int, line: Line) -> None:
        if step in (44, 50):
            line["loss"] = 9.0

    found = likely(write_run(tmp_path / "bad", batch, kind="sft", base=supervised))
    assert (found.cause, found.first_step) == ("data", 44)
    assert "over 3 times its usual value at step 44, 50" in found.evidence[0]


def test_a_reward_that_pays_for_something_else(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step, value in ((20, 0.6), (40, 0.7), (60, 0.2)):
            file.write(json.dumps({"step": step, "time": 1.0 * step, "eval/exact_match": value}) + "\n")
    (stage,) = collect([tmp_path]).runs[0].stages
    assert likely(stage).cause == "hacking"
    assert "held-out exact match fell from 70.0% to 20.0%" in likely(stage).evidence


def test_what_nobody_knows_is_told_by_what_moved(tmp_path: Path) -> None:
    change = from_bad_on(reward=falling, entropy=lambda ago, _: 3.0)
    found = likely(write_run(tmp_path, change))
    assert found.cause == "unknown"
    assert found.evidence[1].startswith("grpo/entropy went from 0.3")


def test_the_verdict_names_the_cause(tmp_path: Path) -> None:
    write_run(tmp_path, from_bad_on(mismatch_kl=lambda ago, _: 0.5, reward=falling))
    said = collect([tmp_path]).runs[0].verdict
    assert said.level == "bad"
    assert said.text.endswith("went wrong: trainer and rollout disagree, from step 30 on.")
