"""The command line as such: what it takes, and how it says what went wrong."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dots_align import cli
from dots_align.config import DataSection, SftRecipe
from dots_align.run_directory import open_run_directory

EVAL = ["eval", "checkpoint", "--tasks", "gsm8k", "max_tokens=64", "--limit", "5", "top_p=0.9"]


def test_keys_may_stand_behind_options() -> None:
    options = cli._parse(EVAL)
    assert options.overrides == ["max_tokens=64", "top_p=0.9"]
    assert options.limit == 5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["sft", "a.yaml", "--train.max_steps=3"],
            "--train.max_steps=3: a key of a recipe is given without dashes, train",
        ),
        (["sft", "a.yaml", "--ouput"], "unrecognized arguments: --ouput"),
        ([*EVAL, "stray"], "unrecognized arguments"),
        (["chat", "checkpoint", "max_tokens=3"], "unrecognized arguments: max_tokens=3"),
    ],
)
def test_what_is_neither_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli._parse(words)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_tasks_are_listed_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--tasks", "list"])
    assert stopped.value.code == 0
    assert {"gsm8k", "mmlu"} <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("command", "missing"), [("sft", "recipe"), ("eval", "recipe|checkpoint"), ("release", "checkpoint")]
)
def test_only_what_is_missing_is_said_to_be(capsys: pytest.CaptureFixture[str], command: str, missing: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([command])
    assert capsys.readouterr().err.endswith(f"the following arguments are required: {missing}\n")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    run = open_run_directory(
        SftRecipe(stage="sft", output_dir=str(tmp_path / "run"), data=DataSection(path="synthetic:sft"))
    )
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(run), "--output", str(tmp_path / "file" / "page.html")])
    assert str(stopped.value.code).startswith(f"dots-align report: {tmp_path / 'file'}")
    assert str(stopped.value.code).endswith(": File exists")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/sft"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_whoever_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """safetensors raises no OSError."""

    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_report", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", "run"])
    told = str(stopped.value.code)
    assert "\n" not in told
    assert "No space left on device; make room, and give the same command again" in told
