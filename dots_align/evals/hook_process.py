"""The process of an on-save hook beside the trainer. Light: only hooks that need torch import it."""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dots_align.config import RECIPES, HookSection, ParallelSection
from dots_align.scoring.functions import load_function


def main() -> None:
    """Reads from standard input what to do, and writes into a file what the hook returned, or why it failed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    request = json.load(sys.stdin)
    if os.getppid() != request["trainer"]:  # it ended before the line above: whoever goes on runs the hook again
        return
    told = {"status": "done", "metrics": {}, "error": None}
    try:
        recipe: Any = RECIPES[request["stage"]].model_validate(request["recipe"])
        recipe = recipe.model_copy(update={"parallel": ParallelSection()})  # a process alone
        hook = _resolve(HookSection.model_validate(request["hook"]))
        told["metrics"] = checked_metrics(hook(Path(request["checkpoint"]), recipe))
    except Exception as error:  # noqa: BLE001 - a hook is the user's code; the trainer reports it
        traceback.print_exc()
        told |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    answer = Path(request["answer"])
    answer.with_suffix(".tmp").write_text(json.dumps(told), encoding="utf-8")
    os.replace(answer.with_suffix(".tmp"), answer)


def _resolve(section: HookSection) -> Callable[..., Any]:
    if ":" in section.hook:
        return user_hook(section)
    from dots_align.evals.on_save import resolve_hook
    from dots_align.runtime import setup_logging

    setup_logging()
    return resolve_hook(section)


def user_hook(section: HookSection) -> Callable[..., Any]:
    """The function a recipe names, its arguments filled in. Raises ValueError if there is none or it takes others."""
    function = load_function(section.hook, "on_save")
    try:
        inspect.signature(function).bind(None, None, **section.arguments)
    except TypeError as error:
        raise ValueError(f"on_save: {section.hook} has to take (checkpoint, recipe) and `arguments`: {error}") from None
    return functools.partial(function, **section.arguments) if section.arguments else function


def checked_metrics(found: Any) -> dict[str, float]:
    """What a hook returned, as finite numbers by name. Raises ValueError for anything else."""
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, int | float) and math.isfinite(v) for v in found.values()):
        raise ValueError(f"a hook returns None or numbers by name, this one returned {found!r}")
    return {str(name): float(value) for name, value in found.items()}
