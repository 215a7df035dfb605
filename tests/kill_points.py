"""Runs `dots-align` in a process that ends itself with SIGKILL at a point told beforehand."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

from forked import program

import dots_align.checkpoint
import dots_align.evals.answers
from dots_align.evals.publisher import Publisher
from dots_align.generation.output import Output
from dots_align.model.training import TrainingEngine
from dots_align.rollout.engine import RolloutEngine
from dots_align.runtime import MetricsLog
from dots_align.scoring import Scoring

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
    # What is written a line at a time.
    "metrics": ((MetricsLog, "log"),),
    "samples": ((Output, "write"),),
    "answers": ((dots_align.evals.answers, "_answer"),),
}


def _dies(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def run(command: list[str], point: tuple[str, int] | None, call: int) -> None:
    """`point`: a phase and which of its points; `call`: the call there that is the last."""
    if point is not None:
        owner, name = POINTS[point[0]][point[1]]
        setattr(owner, name, _dies(getattr(owner, name), call))
    program(command)
