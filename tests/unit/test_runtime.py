"""The run directory, its logs, and the state of the random generators."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dots_align.config import DataSection, GrpoRecipe, ModelSection, OptimSection, RewardSection, SftRecipe
from dots_align.runtime import (
    MetricsLog,
    device,
    leave_run_directories,
    open_run_directory,
    preserved_rng,
    recipe_hash,
    seed_everything,
    write_json,
)


def recipe(directory: Path, **keys: Any) -> SftRecipe:
    return SftRecipe(stage="sft", output_dir=str(directory), data=DataSection(path="synthetic:sft"), **keys)


def complaint(recipe: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        open_run_directory(recipe)
    return str(caught.value)


def test_a_fresh_directory_is_made_and_records_the_recipe(tmp_path: Path) -> None:
    run = tmp_path / "a" / "b"
    assert open_run_directory(recipe(run, seed=3)) == run
    record = json.loads((run / "run.json").read_text())
    assert set(record) == {"stage", "recipe", "identity", "recipe_hash", "created", "version"}
    assert record["stage"] == "sft"
    assert record["recipe"]["seed"] == 3
    assert record["recipe"]["optim"]["learning_rate"] == 1e-5
    assert [p.name for p in run.iterdir()] == ["run.json"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    open_run_directory(recipe(tmp_path))
    assert (tmp_path / "run.json").is_file()


def test_the_same_recipe_resumes(tmp_path: Path) -> None:
    open_run_directory(recipe(tmp_path))
    before = (tmp_path / "run.json").read_text()
    (tmp_path / "checkpoint-5").mkdir()
    open_run_directory(recipe(tmp_path))
    assert (tmp_path / "checkpoint-5").is_dir()
    assert (tmp_path / "run.json").read_text() == before


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    open_run_directory(recipe(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    assert complaint(recipe(tmp_path, optim=OptimSection(learning_rate=2e-5))) == (
        f"output_dir={tmp_path}: it holds another run (optim.learning_rate: 1e-05 -> 2e-05); "
        "choose another output_dir, or give overwrite=true to delete what is there"
    )


def test_a_run_that_never_started_makes_way(tmp_path: Path) -> None:
    """After a typo in data.path, say, the mended recipe may have the directory."""
    open_run_directory(recipe(tmp_path))
    (tmp_path / "init").mkdir()
    open_run_directory(recipe(tmp_path, seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["seed"] == 1


def test_many_differences_are_counted(tmp_path: Path) -> None:
    open_run_directory(recipe(tmp_path))
    (tmp_path / "checkpoint-1").mkdir()
    optim = OptimSection(learning_rate=2e-5, warmup_steps=1, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9)
    assert "; and 2 more keys)" in complaint(recipe(tmp_path, optim=optim))


def test_a_run_of_another_stage_is_refused(tmp_path: Path) -> None:
    open_run_directory(recipe(tmp_path))
    (tmp_path / "checkpoint-1").mkdir()
    grpo = GrpoRecipe(
        stage="grpo",
        output_dir=str(tmp_path),
        data=DataSection(path="synthetic:prompts"),
        rewards=(RewardSection(function="a:b"),),
    )
    assert "it holds another run" in complaint(grpo)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_run_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    told = complaint(recipe(tmp_path, overwrite=overwrite))
    assert told == (f"output_dir={tmp_path}: the directory is not empty and holds no run; choose another output_dir")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "this is a file" in complaint(recipe(tmp_path / "file"))


def test_overwrite_deletes_an_earlier_run(tmp_path: Path) -> None:
    open_run_directory(recipe(tmp_path))
    (tmp_path / "checkpoint-5").mkdir()
    open_run_directory(recipe(tmp_path, seed=4, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    # Without the flag the very same run now resumes: overwrite says what to do, not what is computed.
    open_run_directory(recipe(tmp_path, seed=4))


@pytest.mark.parametrize("text", ["{torn", "[]", '{"recipe_hash": "x"}', '{"recipe_hash": "x", "recipe": 3}'])
def test_an_unreadable_record_is_said_to_be_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "checkpoint-1").mkdir()
    assert "run.json there is not readable" in complaint(recipe(tmp_path))


def test_somebody_elses_run_json_and_data_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"scripts": {}}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.csv").write_text("years of work")
    with contextlib.suppress(ValueError):
        open_run_directory(recipe(tmp_path))
    assert (tmp_path / "data" / "thesis.csv").is_file()


def test_overwriting_never_deletes_what_the_run_starts_from(tmp_path: Path) -> None:
    run = open_run_directory(recipe(tmp_path / "run"))
    (run / "checkpoint-3").mkdir()
    (run / "last").symlink_to("checkpoint-3")
    told = complaint(recipe(run, model=ModelSection(path=str(run / "last")), overwrite=True))
    assert told == (
        f"output_dir={run}: emptying it would delete model.path={run / 'last'}, which this run reads; choose another"
    )
    assert (run / "checkpoint-3").is_dir()


def test_overwriting_never_deletes_runs_of_their_own(tmp_path: Path) -> None:
    open_run_directory(recipe(tmp_path))
    open_run_directory(recipe(tmp_path / "other"))
    assert "other runs lie in it (other)" in complaint(recipe(tmp_path, overwrite=True))
    assert (tmp_path / "other" / "run.json").is_file()


def test_a_directory_is_one_processs_until_it_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    assert complaint(recipe(tmp_path)) == (f"output_dir={tmp_path}: another process is at work in it; choose another")
    assert list(tmp_path.iterdir()) == []
    holder.kill()
    holder.wait()
    open_run_directory(recipe(tmp_path))
    open_run_directory(recipe(tmp_path))
    leave_run_directories()
    mine = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(mine)


LOCK = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    assert complaint(recipe(run)) == f"output_dir={run}: cannot be made (Not a directory); choose another"


@pytest.mark.parametrize(("name", "told"), [("gpu", "torch knows no such device"), ("cuda:0", "sees no GPU here")])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    if name != "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("DOTS_ALIGN_DEVICE", name)
    with pytest.raises(ValueError, match=f"DOTS_ALIGN_DEVICE={name}: .*{told}"):
        device()


def test_recipe_hash_depends_on_every_key_but_overwrite(tmp_path: Path) -> None:
    assert recipe_hash(recipe(tmp_path)) == recipe_hash(recipe(tmp_path, overwrite=True, trackers=("wandb",)))
    assert recipe_hash(recipe(tmp_path)) != recipe_hash(recipe(tmp_path, seed=1))


def lines(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_bytes().decode().split("\n") if line]


def test_metrics_router_and_samples_are_lines_of_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, {"sft/loss": 1.5})
    log.log_router(1, [1, 2], [[0.25, 0.75], [1 / 3, 2 / 3]])
    log.log_samples(1, [{"prompt": "你好", "reward": 1.0}, {"prompt": "b", "reward": 0.0}])
    (metrics,) = lines(tmp_path, "metrics")
    assert (metrics["step"], metrics["sft/loss"]) == (1, 1.5)
    assert 0 <= metrics["time"] < 60
    assert lines(tmp_path, "router") == [{"step": 1, "layers": [1, 2], "load": [[0.25, 0.75], [0.333333, 0.666667]]}]
    assert lines(tmp_path, "samples") == [
        {"step": 1, "prompt": "你好", "reward": 1.0},
        {"step": 1, "prompt": "b", "reward": 0.0},
    ]
    assert "你好" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")


def test_resuming_drops_later_and_half_written_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"x": step})
        log.log_router(step, [1], [[1.0]])
        log.log_samples(step, [{"prompt": "a"}, {"prompt": "b"}])
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "ti')
    resumed = MetricsLog(tmp_path, resume_step=2)
    assert [line["step"] for line in lines(tmp_path, "metrics")] == [1, 2]
    assert [line["step"] for line in lines(tmp_path, "router")] == [1, 2]
    assert [line["step"] for line in lines(tmp_path, "samples")] == [1, 1, 2, 2]
    resumed.log(3, {"x": 33})
    assert [(line["step"], line["x"]) for line in lines(tmp_path, "metrics")] == [(1, 1), (2, 2), (3, 33)]


def test_a_run_that_starts_anew_keeps_no_line(tmp_path: Path) -> None:
    MetricsLog(tmp_path).log(1, {"x": 1})
    MetricsLog(tmp_path)
    assert lines(tmp_path, "metrics") == []


def test_samples_with_unicode_line_separators_survive_a_resume(tmp_path: Path) -> None:
    sample = {"prompt": "a\u2028b\x85c", "response": "d\u2029e\n"}
    MetricsLog(tmp_path).log_samples(1, [sample])
    MetricsLog(tmp_path, resume_step=1)
    assert lines(tmp_path, "samples") == [{"step": 1, **sample}]


def test_tensorboard_gets_the_same_values(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed_at in (0, 1):
        log = MetricsLog(tmp_path, resumed_at, recipe(tmp_path, trackers=("tensorboard",)))
        if not resumed_at:
            log.log(1, {"sft/loss": 1.5})
            log.log(2, {"sft/loss": 99.0})  # of a process that died before it saved
    log.log(2, {"sft/loss": 1.25})
    log.log(1, {"eval/exact_match": 0.5})  # by a hook that took longer than a step
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/loss")] == [(1, 1.5), (2, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("eval/exact_match")] == [(1, 0.5)]


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="trackers names trackio, which is not installed; pip install trackio"):
        MetricsLog(tmp_path, recipe=recipe(tmp_path, trackers=("trackio",)))


def test_write_json_replaces_the_file_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_preserved_rng_leaves_every_generator_as_it_was_even_after_an_exception() -> None:
    seed_everything(5)
    wanted = draws()
    seed_everything(5)
    with pytest.raises(RuntimeError), preserved_rng():  # noqa: PT012
        inside = draws()
        seed_everything(6)
        raise RuntimeError
    assert inside == wanted
    assert draws() == wanted


def test_seeding_with_a_large_seed() -> None:
    seed_everything(2**40 + 1)
    first = draws()
    seed_everything(2**40 + 1)
    assert draws() == first


END = """
import atexit, sys, torch, torch.distributed as dist
from dots_align.runtime import leave
sys.setswitchinterval(1000)  # threads of gloo have to wait for the interpreter, as they do on a busy machine
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
groups = [dist.new_group([0]) for _ in range(8)]
atexit.register(print, "said at exit")
for group in groups:
    dist.all_reduce(torch.ones(1 << 22), group=group, async_op=True)
leave()
"""


def test_a_process_leaves_in_good_order_whatever_gloo_still_does() -> None:
    """Without the last line this one is aborted nearly every time."""
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "said at exit\n"
