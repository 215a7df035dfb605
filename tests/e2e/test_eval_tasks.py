"""`dots-align eval CHECKPOINT --tasks …` through the real command line, killed and gone on with."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dots_align import cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    rows = ({"question": f"What is {n}+1?", "answer": f"#### {n + 1}"} for n in range(270))
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def test_a_killed_evaluation_goes_on_to_the_same_result(start: Path, data: Path, tmp_path: Path, spawn, capsys):
    arguments = ["eval", str(start), "max_tokens=100", "--tasks", "gsm8k", "--data", str(data)]
    process = spawn(*arguments, "--output", str(tmp_path / "killed"), dies_at=("answers", 41))
    assert process.wait() == -signal.SIGKILL, process.said()
    (part,) = (tmp_path / "killed").glob(".gsm8k-*.part-0.jsonl")
    assert len(part.read_text().splitlines()) == 40
    for name in ("killed", "whole"):
        cli.main([*arguments, "--output", str(tmp_path / name)])
    printed = capsys.readouterr().out
    assert "gsm8k  accuracy" in printed
    items = [next((tmp_path / name).glob("gsm8k-*.items.jsonl")).read_text() for name in ("killed", "whole")]
    assert items[0] == items[1]
    results = json.loads((tmp_path / "whole" / "results.json").read_text())["results"]
    assert results["gsm8k"]["num_items"] == 270


def test_tasks_of_a_recipe_are_asked_with_its_evaluation(start: Path, data: Path, tmp_path: Path, recipe: Callable):
    tasks = f"evaluation.tasks={{names: [gsm8k], data: {data}, limit: 2}}"
    quick = ("evaluation.num_prompts=2", "evaluation.max_tokens=4", f"output={tmp_path / 'eval.json'}")
    cli.main(["eval", recipe("eval"), f"model.path={start}", tasks, *quick])
    found = json.loads((tmp_path / "eval.json").read_text())
    assert set(found["metrics"]) == {"exact_match", "stop_rate", "mean_length", "gsm8k/accuracy"}
    assert found["tasks"]["gsm8k"]["accuracy"]["high"] > 0


def test_what_cannot_be_evaluated_is_said_at_once(fails: Callable[..., str], start: Path, tmp_path: Path):
    assert "no task 'gsm9k'" in fails("eval", start, "--tasks", "gsm9k")
    assert "none of gsm8k/test.jsonl" in fails("eval", start, "--tasks", "gsm8k", "--data", tmp_path)
    assert "give --tasks for a checkpoint directory" in fails("eval", start)
    told = fails("eval", start, "max_tokns=3", "--tasks", "gsm8k", "--data", tmp_path)
    assert "max_tokns=3: unknown key `sampling.max_tokns`; did you mean `sampling.max_tokens`?" in told
