"""Reward functions by name. Light: scoring processes import it, and nothing of torch."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dots_align.types import Response, RewardModel

RewardFunction = Callable[[Response], float | Awaitable[float]]
ModelLoader = Callable[[str], RewardModel]
"""From the path of a reward model's checkpoint to the model."""


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
        except Exception as error:  # noqa: BLE001 - whatever the user's code does when it is read
            raise ValueError(f"{key}: {place} cannot be loaded: {_told(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        near = difflib.get_close_matches(function, [n for n, v in vars(module).items() if callable(v)], n=1)
        told = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}: {place} has no function {function!r}{told}")
    return found


def load_reward(name: str, arguments: dict[str, Any], load_model: ModelLoader | None = None) -> Callable[..., Any]:
    """The reward function, with its keyword arguments, and its reward model if it uses one, filled in.

    Args:
        load_model: None where no function that uses a reward model will be called.

    Raises:
        ValueError: there is no such function, or it does not take these arguments.
    """
    function = load_function(name, "rewards.function")
    if takes_many(function):
        if not isinstance(arguments.get("checkpoint"), str):
            raise ValueError(f"rewards.arguments of {name}: `checkpoint` is missing, the path of its reward model")
        if load_model is None:
            return function
        model = load_model(arguments["checkpoint"])
        arguments = {"model": model, **{k: v for k, v in arguments.items() if k != "checkpoint"}}
    _check_call(function, name, arguments)
    if not arguments:
        return function
    filled = functools.partial(function, **arguments)
    functools.update_wrapper(filled, function)  # with the range it declares
    return filled


def _check_call(function: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(None, **arguments)
    except TypeError as error:
        given, takes = ", ".join(["a response", *arguments]), ", ".join(signature.parameters) or "nothing"
        raise ValueError(f"rewards.arguments of {name}: {error}; it is given {given}, and takes {takes}") from None


def takes_many(function: Callable[..., Any]) -> bool:
    """Whether it scores all responses in one call, with a reward model."""
    return getattr(function, "uses_reward_model", False)


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{key}: no such file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - as above
        if sys.modules[path.stem] is module:
            del sys.modules[path.stem]
        raise ValueError(f"{key}: {path} cannot be loaded: {_told(error)}") from None
    return module


def _told(error: Exception) -> str:
    """The kind of an error, its message, and the line that raised it."""
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return told  # which names the line
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{told} ({Path(last.filename).name}, line {last.lineno})"


def checked(function: Callable[..., Any], value: Any) -> float:
    """What a reward function returned, as a number.

    Raises:
        ValueError: it is not finite, or outside the range the function declares.
        TypeError: it is no number.
    """
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"returned {value}, not a finite number")
    low, high = getattr(function, "reward_range", (value, value))
    if not low <= value <= high:
        raise ValueError(f"returned {value}, outside the range {low:g} to {high:g} that it declares")
    return value
