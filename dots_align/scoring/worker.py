"""A process that runs reward functions for the trainer, so that one which hangs or crashes can be ended.

It gets (function number, responses, seconds, how many at once) and answers (index, value or `Failure`) for each
response, as they are done.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import random
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from dots_align.scoring.functions import checked, load_reward, takes_many
from dots_align.types import Response


@dataclass(frozen=True)
class Failure:
    """What went wrong in a reward function: the kind of error, its message, and the traceback as text."""

    kind: str
    message: str
    traceback: str = ""


def main(descriptor: int) -> None:
    """Serves until the trainer closes its end, or dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    connection = Connection(descriptor)
    try:
        functions = [load_reward(name, arguments) for name, arguments in connection.recv()]
        connection.send(True)  # ready: from here on time counts
        while True:
            number, responses, seconds, at_once = connection.recv()
            score(functions[number], responses, seconds, at_once, lambda *answer: connection.send(answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def score(
    function: Callable[..., Any],
    responses: list[Response],
    seconds: float,
    at_once: int,
    answer: Callable[[int, float | Failure], None],
) -> None:
    """Calls `answer(index, value or Failure)` for each response: in order, or, for an `async` function, as they come,
    `at_once` at a time, each within `seconds`.
    """
    if inspect.iscoroutinefunction(function):
        asyncio.run(_score_async(function, responses, seconds, at_once, answer))
        return
    if takes_many(function):
        _score_together(function, responses, answer)
        return
    for index, response in enumerate(responses):
        # What a function draws at random depends on the response, not on who came before it in this process.
        random.seed(f"{response.prompt.source}\n{response.text}")
        try:
            answer(index, checked(function, function(response)))
        except Exception as error:  # noqa: BLE001 - the one place where the user's code may fail without ending the run
            answer(index, _failure(error))


def _score_together(
    function: Callable[..., Any], responses: list[Response], answer: Callable[[int, float | Failure], None]
) -> None:
    """One call for all: what it raises is the failure of each."""
    found: list[float | Failure]
    try:
        values = function(responses)
        if len(values) != len(responses):
            raise ValueError(f"returned {len(values)} values for {len(responses)} responses")
        found = [checked(function, value) for value in values]
    except Exception as error:  # noqa: BLE001 - as above
        found = [_failure(error)] * len(responses)
    for index, value in enumerate(found):
        answer(index, value)


async def _score_async(
    function: Callable[..., Any],
    responses: list[Response],
    seconds: float,
    at_once: int,
    answer: Callable[[int, float | Failure], None],
) -> None:
    slots = asyncio.Semaphore(at_once)

    async def one(index: int, response: Response) -> None:
        async with slots:
            try:
                value = checked(function, await asyncio.wait_for(function(response), seconds))
            except TimeoutError:
                answer(index, Failure("Timeout", f"took longer than {seconds:g} s"))
            except Exception as error:  # noqa: BLE001 - as above
                answer(index, _failure(error))
            else:
                answer(index, value)

    await asyncio.gather(*(one(index, response) for index, response in enumerate(responses)))


def _failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, str(error), "".join(traceback.format_exception(error)))
