"""The run directory, its logs, and the state of the random generators."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dots_align import runtime
from dots_align.config import DataSection, SftRecipe
from dots_align.runtime import (
    MetricsLog,
    device,
    logger,
    preserved_rng,
    progress,
    seed_everything,
    setup_logging,
    write_json,
)


def recipe(directory: Path, **keys: Any) -> SftRecipe:
    return SftRecipe(stage="sft", output_dir=str(directory), data=DataSection(path="synthetic:sft"), **keys)


@pytest.mark.parametrize(("name", "told"), [("gpu", "torch knows no such device"), ("cuda:0", "sees no GPU here")])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    if name != "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("DOTS_ALIGN_DEVICE", name)
    with pytest.raises(ValueError, match=f"DOTS_ALIGN_DEVICE={name}: .*{told}"):
        device()


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
    for name in ("metrics", "samples"):
        with (tmp_path / f"{name}.jsonl").open("ab") as out:
            out.write('{"step": 2, "prompt": "你'.encode()[:-1])
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


def test_progress_in_a_log_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a bar drawn over itself, which in a file is one long line."""
    setup_logging()
    monkeypatch.setattr(runtime, "SECONDS_BETWEEN_LINES", 3600)
    with progress(9, "sft", "step") as bar:
        for step in range(9):
            bar.set_postfix(loss=step)
            bar.update()
            if step == 4:
                logger.warning("a message")
                monkeypatch.setattr(runtime, "SECONDS_BETWEEN_LINES", 0)
                bar.refresh()
                monkeypatch.setattr(runtime, "SECONDS_BETWEEN_LINES", 3600)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "a message"
    assert second.startswith("sft:  56%|")
    assert "5/9" in second
    assert second.endswith("loss=4]")


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
atexit.register(sys.stdout.close)  # as where whoever reads it has enough
atexit.register(print, "said at exit")
for group in groups:
    dist.all_reduce(torch.ones(1 << 22), group=group, async_op=True)
leave()
"""


def test_a_process_leaves_in_good_order_whatever_gloo_still_does() -> None:
    """Without the last line this one is aborted nearly every time."""
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not re.search("terminate|Traceback", done.stderr), done.stderr  # gloo may warn of a host without an address
    assert done.stdout == "said at exit\n"
