"""What is done with each published checkpoint: hooks that may fail in any way, the best kept, an early end."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ends

from dots_align.checkpoint import check_whole, checkpoints, staged
from dots_align.config import DataSection, HookSection, SaveSection, SftRecipe, recipe_dict
from dots_align.evals.hooks import SaveHook, run_beside, run_here
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.publisher import Publisher, no_longer_improves, ranked
from dots_align.runtime import MetricsLog

HOOKS = """
import os, signal, subprocess, time

def boom(checkpoint, recipe):
    raise ZeroDivisionError("oh no")

def hang(checkpoint, recipe):
    (checkpoint.parent / "child.pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)

def killed(checkpoint, recipe):
    os.kill(os.getpid(), signal.SIGKILL)

def quits(checkpoint, recipe):
    raise SystemExit(3)

def words(checkpoint, recipe):
    return {"eval/mine": "high"}

def mine(checkpoint, recipe, plus=0.0):
    return {"eval/mine": recipe.seed + plus, "eval/world": float(os.environ.get("WORLD_SIZE", 0))}
"""


def recipe(output_dir: Path, *on_save: Any, **keys: Any) -> SftRecipe:
    sections = tuple(HookSection.model_validate(given) for given in on_save)
    data = DataSection(path="synthetic:sft")
    return SftRecipe(stage="sft", output_dir=str(output_dir), data=data, on_save=sections, seed=7, **keys)


def publish(run_dir: Path, step: int, exact_match: float | None = None) -> Path:
    """A published checkpoint of a small file, evaluated if a score is given."""
    final = run_dir / f"checkpoint-{step}"
    with staged(final, {"stage": "sft", "step": step}) as staging:
        (staging / "config.json").write_text("{}")
    if exact_match is not None:
        (final / "eval.json").write_text(json.dumps({"metrics": {"exact_match": exact_match}}))
    return final


def publisher(run_dir: Path, *on_save: Any, limit: int | None = None) -> Publisher:
    asked = recipe(run_dir, *on_save, save=SaveSection(save_total_limit=limit))
    return Publisher(run_dir, asked, "hash", resolve_hooks(asked))


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture
def hooks(tmp_path: Path) -> str:
    path = tmp_path / "my_hooks.py"
    path.write_text(HOOKS)
    return str(path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("where", ["trainer", "process"])
def test_hooks_that_fail_in_every_way_are_told_and_cost_nothing(
    run_dir: Path, hooks: str, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    failing = ["boom", "hang", "quits", "words"] + (["killed"] if where == "process" else [])
    asked = [{"hook": f"{hooks}:{name}", "in": where} for name in failing]
    asked[1]["timeout_seconds"] = 4 if where == "process" else 1
    asked.append({"hook": f"{hooks}:mine", "in": where, "arguments": {"plus": 0.5}})
    final, log = publish(run_dir, 1), MetricsLog(run_dir)
    state = torch.get_rng_state(), random.getstate()
    publishing = publisher(run_dir, *asked)
    with caplog.at_level(logging.ERROR, "dots_align"):
        publishing.after_publish(final, log)
        told_at_once = {line["hook"] for line in lines(run_dir, "hooks")}
        publishing.finish(log)
    told = {line["hook"]: (line["status"], line["error"]) for line in lines(run_dir, "hooks")}
    assert told["boom"] == ("failed", "ZeroDivisionError: oh no")
    assert told["hang"][0] == "timed_out"
    assert told["quits"][0] == "failed"
    assert "numbers by name" in told["words"][1]
    assert told["mine"] == ("done", None)
    if where == "process":
        assert told["killed"][0] == "killed"
        assert "SIGKILL" in told["killed"][1]
        assert "hang" not in told_at_once, "training waited for a hook beside it"
        assert "ZeroDivisionError: oh no" in (run_dir / "hooks" / "boom-1.log").read_text()
        assert ends(_child_of_hang(run_dir, hooks, final, log)), "what the hook started outlived it"
    else:
        os.kill(int((run_dir / "child.pid").read_text()), signal.SIGKILL)  # nobody else does
    assert "on_save hook boom failed on checkpoint-1: ZeroDivisionError: oh no" in caplog.text
    logged = {name: value for line in lines(run_dir, "metrics") for name, value in line.items()}
    assert logged["eval/mine"] == 7.5
    assert logged["eval/world"] == (1 if where == "trainer" else 0)
    assert {f"on_save/{name}_failed" for name in failing} <= logged.keys()
    check_whole(run_dir / "last")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def _child_of_hang(run_dir: Path, hooks: str, final: Path, log: MetricsLog) -> int:
    """The process that `hang` has started. On a busy machine its time may be up before it has begun; then it is run
    again, with more.
    """
    pid, seconds = run_dir / "child.pid", 4
    while not (pid.is_file() and pid.read_text()):
        seconds *= 4
        assert seconds < 600, "it never begins"
        again = publisher(run_dir, {"hook": f"{hooks}:hang", "in": "process", "timeout_seconds": seconds})
        again.after_publish(final, log)
        again.finish(log)
    return int(pid.read_text())


def test_a_hook_that_nothing_can_be_started_for_is_told_and_nobody_waits_for_it(
    run_dir: Path, hooks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing, log = publisher(run_dir, {"hook": f"{hooks}:mine", "in": "process"}), MetricsLog(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(run_dir / "full"))
        publishing.after_publish(publish(run_dir, 1), log)
        ending = threading.Thread(target=publishing.finish, args=(log,), daemon=True)
        ending.start()
        ending.join(300)
    assert not ending.is_alive()
    (line,) = lines(run_dir, "hooks")
    assert line["status"] == "failed"
    assert line["error"].startswith("FileNotFoundError")


def test_a_hook_whose_trainer_is_gone_does_nothing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed while the hook's process began; the trainer that goes on runs the hook again."""
    (tmp_path / "leaves.py").write_text("def a_mark(checkpoint, recipe): (checkpoint.parent / 'mark').touch()")
    section = HookSection(hook=f"{tmp_path}/leaves.py:a_mark", where="process")
    monkeypatch.setattr("dots_align.evals.hooks.os.getpid", lambda: -1)
    hook, final = SaveHook("a_mark", lambda *_: None, section), publish(run_dir, 1)
    result = run_beside(hook, final, recipe(run_dir, section), 1)
    assert (result.status, "status 0" in str(result.error)) == ("failed", True)
    assert not (run_dir / "mark").exists()


class _Slow:
    def __del__(self) -> None:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_hook_is_interrupted_though_its_time_is_up_in_a_finalizer(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Python ignores what is raised."""

    def hook(*_: Any) -> None:
        _Slow()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            time.sleep(0.01)

    monkeypatch.setattr("dots_align.evals.hooks.AGAIN_SECONDS", 0.3)
    section = HookSection(hook="a:b", where="trainer")
    result = run_here(SaveHook("hook", hook, section), run_dir, None, 1, 0.1)
    assert result.status == "timed_out"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_hooks_that_a_crash_cut_off_are_made_up_for_once(run_dir: Path, hooks: str) -> None:
    asked = {"hook": f"{hooks}:mine", "in": "trainer"}
    publish(run_dir, 2)
    final = publish(run_dir, 3)
    publish(run_dir, 4)
    for _ in range(2):
        publisher(run_dir, asked).finish_hooks(final, MetricsLog(run_dir, 3))
    assert [(line["step"], line["hook"]) for line in lines(run_dir, "hooks")] == [(2, "mine"), (3, "mine")]
    assert [(line["step"], line["eval/mine"]) for line in lines(run_dir, "metrics")] == [(2, 7.0), (3, 7.0)]


def test_best_is_the_highest_exact_match_and_the_newest_of_equals(run_dir: Path) -> None:
    publish(run_dir, 5)
    assert ranked(run_dir) == []
    for step, score in ((10, 0.5), (20, 0.7), (30, 0.7), (40, 0.1)):
        publish(run_dir, step, score)
    assert [c.name for c in ranked(run_dir)] == [f"checkpoint-{step}" for step in (30, 20, 10, 40)]


def test_links_follow_a_moved_run(run_dir: Path) -> None:
    publishing, log = publisher(run_dir), MetricsLog(run_dir)
    publishing.after_publish(publish(run_dir, 1, 0.9), log)
    publishing.after_publish(publish(run_dir, 2, 0.1), log)
    assert os.readlink(run_dir / "last") == "checkpoint-2"
    assert os.readlink(run_dir / "best") == "checkpoint-1"
    moved = run_dir.rename(run_dir.with_name("moved"))
    check_whole(moved / "best")
    assert (moved / "last").resolve() == (moved / "checkpoint-2").resolve()


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [1, 2, 3, 4, 5]), (1, [2, 5]), (2, [2, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_old_checkpoints_go_but_the_best_stays(run_dir: Path, limit: int | None, kept: list[int]) -> None:
    publishing = publisher(run_dir, limit=limit)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4)):
        publishing.after_publish(publish(run_dir, step, score), MetricsLog(run_dir, step))
    assert [c.name for c in checkpoints(run_dir)] == [f"checkpoint-{step}" for step in kept]
    assert (run_dir / "best").resolve().name == "checkpoint-2"


def scored(run_dir: Path, publishing: Publisher, values: list[float]) -> None:
    """Publishes a checkpoint for each value, which its hook finds as eval/loss."""
    for step, value in enumerate(values, start=1):
        section = HookSection.model_validate({"hook": "a:b", "in": "trainer"})
        publishing.hooks = [SaveHook("b", lambda *_, found=value: {"eval/loss": found}, section)]
        publishing.after_publish(publish(run_dir, step), MetricsLog(run_dir, step))


def test_what_a_process_left_that_died_while_deleting_goes_too(run_dir: Path) -> None:
    """Also where the step is trained, and its checkpoint dropped, once more."""
    publishing, log = publisher(run_dir, limit=1), MetricsLog(run_dir)
    for step in (1, 7):
        (run_dir / f".checkpoint-{step}.deleted").mkdir()
        (run_dir / f".checkpoint-{step}.deleted" / "half").touch()
    for step in (1, 2):
        publishing.after_publish(publish(run_dir, step), log)
    assert sorted(p.name for p in run_dir.iterdir() if "checkpoint" in p.name) == ["checkpoint-2"]


def test_the_best_k_by_a_metric_stay_beside_the_newest(run_dir: Path) -> None:
    publishing = publisher(run_dir, {"hook": "keep_best", "metric": "eval/loss", "mode": "min", "keep": 2})
    scored(run_dir, publishing, [3.0, 1.0, 2.0, 5.0, 4.0])
    assert [c.name for c in checkpoints(run_dir)] == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]
    assert (run_dir / "best").resolve().name == "checkpoint-2"


def test_a_run_that_no_longer_improves_stops_and_stays_stopped(run_dir: Path) -> None:
    asked = {"hook": "stop_early", "metric": "eval/loss", "mode": "min", "patience": 2}
    publishing = publisher(run_dir, asked)
    scored(run_dir, publishing, [3.0, 2.0, 2.0])
    assert not publishing.stopped
    scored(run_dir, publishing, [3.0, 2.0, 2.0, 2.5])
    assert publishing.stopped
    MetricsLog(run_dir, resume_step=4)
    assert publisher(run_dir, asked).stopped
    (line,) = [line for line in lines(run_dir, "hooks") if line["hook"] == "stop_early"]
    assert line["reason"] == "eval/loss was no better in the last 2 evaluations"


@pytest.mark.parametrize(
    ("values", "keys", "expected"),
    [
        ([0.1, 0.2], {"patience": 2}, False),
        ([0.3, 0.2, 0.2], {"patience": 2}, True),
        ([0.3, 0.2, 0.31], {"patience": 2}, False),
        ([0.3, 0.2, 0.31], {"patience": 2, "min_delta": 0.05}, True),
        ([0.3, 0.2, 0.31], {"patience": 2, "mode": "min"}, False),
        ([0.2, 0.3, 0.31], {"patience": 2, "mode": "min"}, True),
    ],
)
def test_what_counts_as_no_longer_improving(values: list[float], keys: dict[str, Any], expected: bool) -> None:
    assert no_longer_improves(values, HookSection.model_validate({"hook": "stop_early", **keys})) is expected


def test_pushing_leaves_a_whole_copy(run_dir: Path, tmp_path: Path) -> None:
    log = MetricsLog(run_dir)
    publishing = publisher(run_dir, {"hook": "push", "to": str(tmp_path / "shelf")})
    publishing.after_publish(publish(run_dir, 1), log)
    publishing.finish(log)
    check_whole(tmp_path / "shelf" / "sft-checkpoint-1")
    assert lines(run_dir, "hooks")[0]["status"] == "done"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"hook": "keep_best", "patience": 2}, "`keep_best` has no key `patience`"),
        ({"hook": "evalute"}, "`evalute` is none of evaluate, keep_best, stop_early, push, nor a module:function"),
        ({"hook": "push"}, "`push` needs `to`"),
    ],
)
def test_hooks_that_make_no_sense_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        HookSection.model_validate(given)


def test_a_function_that_does_not_take_its_arguments_is_refused(run_dir: Path, hooks: str) -> None:
    with pytest.raises(ValueError, match=r"boom has to take \(checkpoint, recipe\) and `arguments`"):
        publisher(run_dir, {"hook": f"{hooks}:boom", "arguments": {"x": 1}})


def test_hooks_survive_the_way_through_a_recipes_json(run_dir: Path, hooks: str) -> None:
    asked = recipe(run_dir, {"hook": f"{hooks}:mine", "in": "trainer"}, "keep_best", f"{hooks}:boom")
    again = SftRecipe.model_validate(recipe_dict(asked))
    assert again == asked
    assert [section.in_trainer for section in again.on_save] == [True, False, False]
