"""Calling the user's reward functions: found by name, run one response at a time, failures logged and counted."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dots_align.runtime import logger
from dots_align.types import Response

RewardFunction = Callable[[Response], float]


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function named `module:function` or `path/to/file.py:function`.

    Raises:
        ValueError: naming the recipe key, if there is no such file, module or function.
    """
    place, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"{key}: {name!r} must be `module:function` or `path/to/file.py:function`")
    if place.endswith(".py"):
        module = _load_file(Path(place), key)
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"{key}: cannot import {place!r} ({error}); is it installed, or on PYTHONPATH?") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{key}: {place} has no function {function!r}")
    return found


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{key}: no such file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


class RewardSum:
    """The weighted sum of reward functions.

    A function that raises, or returns something that is no finite number, counts as 0 for that response: the first
    failure of each function is logged in full, all are counted, and the run goes on.
    """

    def __init__(self, rewards: Sequence[tuple[str, float]]) -> None:
        short = [name.rpartition(":")[2] for name, _ in rewards]
        names = [s if short.count(s) == 1 else name for s, (name, _) in zip(short, rewards, strict=True)]
        self._parts = [
            (shown, load_function(name, "rewards.function"), weight)
            for shown, (name, weight) in zip(names, rewards, strict=True)
        ]
        self.num_errors = 0
        self._reported: set[str] = set()

    def __call__(self, response: Response) -> tuple[float, dict[str, float]]:
        """The sum, and each function's own value."""
        values = {name: self._call(name, function, response) for name, function, _ in self._parts}
        return sum(weight * values[name] for name, _, weight in self._parts), values

    def _call(self, name: str, function: RewardFunction, response: Response) -> float:
        try:
            value = float(function(response))
            if not math.isfinite(value):
                raise ValueError(f"returned {value}, not a finite number")
        except Exception as error:  # noqa: BLE001 - the one place where the user's code may fail without ending the run
            self.num_errors += 1
            if name not in self._reported:
                self._reported.add(name)
                logger.exception(
                    "reward %s failed on %s (%s: %s); it counts as 0, further failures are only counted",
                    name,
                    response.prompt.source,
                    type(error).__name__,
                    error,
                )
            return 0.0
        return value
