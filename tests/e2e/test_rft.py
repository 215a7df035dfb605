"""Rejection-sampling fine-tuning through the command line: what it keeps, what it says of it, and that it goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dots_align import cli
from dots_align.config import DataSection
from dots_align.data.sources import load_conversations

# The model has hardly learned anything: few of its answers end within their tokens, and none is right.
QUICK = (
    "data.max_samples=16",
    "rollout.group_size=16",
    "selection.max_per_prompt=2",
    "selection.max_bin_share=1.0",
    "train.max_steps=2",
    "train.sessions_per_sample=2",
    "optim.min_learning_rate=5.0e-4",
    "optim.warmup_steps=0",
    "logging.logging_steps=1",
    "mix.ratio=0.5",
    "on_save=[]",
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def keep(path: Path, count: int) -> None:
    """What a process leaves that dies after so many lines, in the middle of the next."""
    text = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(text[:count]) + text[count][:40], encoding="utf-8")


def test_right_answers_are_selected_counted_and_trained_on_and_a_dead_run_goes_on(
    recipe: Callable[[str], str], start: Path, tmp_path: Path, fails
):
    reward = tmp_path / "even.py"
    reward.write_text("def even(response):\n    return float(len(response.response_ids) % 2 == 0)\n")
    run_dir = tmp_path / "rft"
    command = ["rft", recipe("rft"), f"output_dir={run_dir}", f"model.path={start}", *QUICK]
    command.append(f"rewards.0.function={reward}:even")
    cli.main(command)
    left = run_dir / "rft"
    samples, selected = lines(left / "samples.jsonl"), lines(left / "selected.jsonl")
    counts = json.loads((left / "counts.json").read_text())
    answers = {(line["source"], i): s for line in samples for i, s in enumerate(line["samples"])}
    ended = {k: s for k, s in answers.items() if s["finish_reason"] == "stop"}
    right = {k for k, s in ended.items() if s["num_tokens"] % 2 == 0 and s["text"].strip()}
    own = [line for line in selected if line["origin"] == "sampled"]
    assert own
    for line in own:
        key = line["source"], line["sample"]
        assert key in right
        assert line["messages"][-1] == {"role": "assistant", "content": answers[key]["text"]}
        assert line["pass_rate"] == sum(source == line["source"] for source, _ in right) / 16
        assert line["checkpoint"] == str(start.resolve())
        assert line["rewards"] == {"even": 1.0}
    assert max(sum(a["source"] == b["source"] for a in own) for b in own) <= 2
    assert counts["sampled"] == len(answers) == 256
    assert counts["right"] == len(right)
    assert counts["unfinished"] == sum(s["finish_reason"] == "length" for s in answers.values())
    assert counts["selected"] == len(own) == sum(one["kept"] for one in counts["bins"])
    assert counts["mixed"] == len(selected) - len(own) == round(0.5 * len(own))
    assert [c.messages[-1].content for c in load_conversations(DataSection(path=str(left / "selected.jsonl")), 0)]
    rates = [line["rft/learning_rate"] for line in lines(run_dir / "metrics.jsonl")]
    assert len(rates) == 2
    assert rates == pytest.approx([1e-3, 7.5e-4])  # the second step is half way to the floor
    weights = (run_dir / "last" / "model.safetensors").read_bytes()
    written = {name: (left / name).read_bytes() for name in ("selected.jsonl", "counts.json")}
    for died_while in ("sampling", "scoring", "training"):
        for checkpoint in run_dir.glob("checkpoint-*"):
            checkpoint.rename(tmp_path / f"{checkpoint.name}-before-{died_while}")
        if died_while != "training":
            (left / "selected.jsonl").unlink()
            keep(left / "scores.jsonl", 5)
        if died_while == "sampling":
            (left / "scores.jsonl").unlink()
            (left / "scores.jsonl.run.json").unlink()
            keep(left / "samples.jsonl", 7)
        cli.main(command)
        assert (run_dir / "last" / "model.safetensors").read_bytes() == weights, died_while
        assert {name: (left / name).read_bytes() for name in written} == written, died_while
    refused = fails(*command, f"output_dir={tmp_path / 'other'}", "selection.min_reward=2.0")
    assert "none of 256 answers is right, there is nothing to learn from" in refused
