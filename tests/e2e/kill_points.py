"""Runs `dots-align` again and again, each time in a process forked from this one, which has imported everything, and
which ends itself with SIGKILL at a point told beforehand.

It reads a line of JSON for each: {"command": […], "output": file, "point": [phase, number] or null, "call": n}, and
answers with the exit status, that of `subprocess`, when the process is gone.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

import dots_align.checkpoint
from dots_align import cli
from dots_align.evals.publisher import Publisher
from dots_align.model.training import TrainingEngine
from dots_align.rollout.engine import RolloutEngine
from dots_align.scoring import Scoring
from dots_align.stages import grpo  # noqa: F401 - all that a forked process needs is here

# A phase, and what is called in it; a call told by its number is the last thing the process comes to.
POINTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "rollout": ((RolloutEngine, "step"),),
    "scoring": ((Scoring, "add"), (Scoring, "results")),
    # Gradients are there but no step is made; a step is made but the schedule has not moved.
    "update": ((TrainingEngine, "optimizer_step"), (TrainingEngine, "lr_scheduler_step")),
    # Written but not sealed; sealed but not published; published but not linked.
    "save": (
        (dots_align.checkpoint, "seal"),
        (dots_align.checkpoint, "publish"),
        (Publisher, "after_publish"),
    ),
}


def _dies(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def run(command: list[str], output: str, point: tuple[str, int] | None, call: int) -> None:
    with open(output, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if point is not None:
        owner, name = POINTS[point[0]][point[1]]
        setattr(owner, name, _dies(getattr(owner, name), call))
    cli.main(command)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(**json.loads(line))
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
