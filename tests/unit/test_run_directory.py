"""The run directory: whose it is, which recipe's run lies in it, and what may be deleted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dots_align.config import DataSection, GrpoRecipe, ModelSection, OptimSection, RewardSection, SftRecipe
from dots_align.run_directory import leave_run_directories, open_run_directory, recipe_hash


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


def test_recipe_hash_depends_on_every_key_but_overwrite(tmp_path: Path) -> None:
    assert recipe_hash(recipe(tmp_path)) == recipe_hash(recipe(tmp_path, overwrite=True, trackers=("wandb",)))
    assert recipe_hash(recipe(tmp_path)) != recipe_hash(recipe(tmp_path, seed=1))
