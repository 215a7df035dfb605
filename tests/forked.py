"""Processes of their own, with an exit status and an end by any signal, that need not import everything first: they are
forked from one server, which has.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 1800
# All that a process of ours imports in its life. None of it starts a thread, so that forking is safe.
PRELOAD = [
    "datasets",
    "peft",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.dots1.modeling_dots1",
    "transformers.trainer",
    "dots_align.evals.command",
    "dots_align.experts.command",
    "dots_align.export.adapter",
    "dots_align.export.targets",
    "dots_align.generation.command",
    "dots_align.parity.command",
    "dots_align.planner.command",
    "dots_align.release.command",
    "dots_align.report.page",
    "dots_align.stages.dpo",
    "dots_align.stages.grpo",
    "dots_align.stages.pipeline",
    "dots_align.stages.ppo",
    "dots_align.stages.reward_model",
    "dots_align.stages.rft",
    "dots_align.stages.sft",
    "dots_align.terminal_chat",
]


def context() -> Any:
    """What makes processes; the server starts with the first of them."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOAD)
    return made


def _begin(function: Callable[..., Any], arguments: tuple, output: str, text: str, cwd: str, names: dict) -> None:
    os.environ.clear()  # of whoever started the server
    os.environ.update(names)
    os.chdir(cwd)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    reading, writing = os.pipe()
    os.write(writing, text.encode())  # less than a pipe holds
    os.close(writing)
    os.dup2(reading, 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    function(*arguments)


def program(arguments: list[str]) -> None:
    """What `dots-align ARGUMENTS` does once Python has started."""
    from dots_align.__main__ import run

    sys.argv = ["dots-align", *arguments]
    run()


class Forked:
    """A process that runs `function(*arguments)`, with the methods of `subprocess.Popen` that tests use.

    Args:
        output: file to which everything it says is added.
        text: its standard input.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        output: Path,
        cwd: Path,
        text: str = "",
        **environment: str,
    ) -> None:
        names = {**os.environ, **environment}
        self._output, self._begun = output, output.stat().st_size if output.is_file() else 0
        given = (function, arguments, str(output), text, str(cwd), names)
        self._process = context().Process(target=_begin, args=given, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        """By SIGKILL, unless it has ended."""
        self._process.kill()

    def said(self) -> str:
        """What it has said so far."""
        text = self._output.read_bytes() if self._output.is_file() else b""
        return text[self._begun :].decode(errors="replace")

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(f"process {self.pid}, which said\n{self.said()}", timeout)
        return self.returncode

    def communicate(self, timeout: float = PATIENCE_SECONDS) -> tuple[str, None]:
        self.wait(timeout)
        return self.said(), None


def until(condition: Callable[[], Any], process: Any, seconds: float = PATIENCE_SECONDS, pause: float = 0.02) -> None:
    """Waits until a condition holds while a process goes on."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up, f"not within {seconds} s"
        time.sleep(pause)
