"""The reward of a response: reward functions weighed, gated and added up."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from dots_align.config import RewardSection, reward_names
from dots_align.scoring.functions import ModelLoader, load_reward, takes_many
from dots_align.scoring.pool import AsyncLine, Job, ScoringPool
from dots_align.scoring.worker import Failure, score
from dots_align.types import Response

# As dots_align.runtime's, without its imports: scoring processes pass through here.
logger = logging.getLogger("dots_align")

Score = tuple[float, dict[str, float]]
"""The sum, and each function's own value (of those behind closed gates too)."""


class RewardSum:
    """The weighted sum of reward functions, each counted only where its gate is open.

    A function that raises, returns something that is no finite number or outside its declared range, or takes longer
    than its time, counts as 0 for that response and closes the gates that hang on it: the first failure of each
    function is logged in full, all are counted, and the run goes on.

    Args:
        rewards: as in a recipe.
        num_workers: most scoring processes; by default one for each core this process may count on, up to 8.
        load_model: of functions that use a reward model.

    Raises:
        ValueError: a function that does not exist, or does not take its arguments.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSection],
        num_workers: int | None = None,
        load_model: ModelLoader | None = None,
    ) -> None:
        self._rewards = dict(zip(reward_names(rewards), rewards, strict=True))
        self._functions = [load_reward(reward.function, reward.arguments, load_model) for reward in rewards]
        for reward, function in zip(rewards, self._functions, strict=True):
            if takes_many(function) and (reward.run_in != "trainer" or load_model is None):
                raise ValueError(
                    f"rewards: {reward.function} uses a reward model, which lives in the training process of an RL or "
                    "RFT stage; give it `run_in: trainer` there"
                )
        called = [(reward.function, reward.arguments) for reward in rewards]
        self._pool = ScoringPool(called, num_workers or default_workers())
        self.num_errors = 0
        self._reported: set[str] = set()

    def __call__(self, response: Response) -> Score:
        return self.score([response])[0]

    def score(self, responses: Sequence[Response]) -> list[Score]:
        """For each response, in order, the sum and each function's own value."""
        scoring = self.begin()
        scoring.add(responses)
        return scoring.results()

    def begin(self) -> Scoring:
        """For responses that come one by one: each is in work from the moment it is there."""
        return Scoring(self)

    @property
    def busy_seconds(self) -> float:
        """How long the scoring processes have been at work, all together."""
        return self._pool.busy_seconds

    def close(self) -> None:
        """Ends the scoring processes."""
        self._pool.close()

    def __enter__(self) -> RewardSum:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lines(self) -> dict[str, Line]:
        """By each reward's name the place where a batch of responses gets in line for it."""
        self._pool.try_again()
        found: dict[str, Line] = {}
        for number, (name, reward) in enumerate(self._rewards.items()):
            function, seconds, at_once = self._functions[number], reward.timeout_seconds, reward.max_concurrency
            if reward.run_in == "trainer":
                found[name] = _OwnLine(function, seconds, at_once)
            elif inspect.iscoroutinefunction(function):
                found[name] = AsyncLine(self._pool, number, seconds, at_once)
            else:
                found[name] = _WorkerLine(self._pool, number, seconds)
        return found

    def totals(self, responses: Sequence[Response], answers: dict[str, list[float | Failure]]) -> list[Score]:
        """Adds up what each function said of each response; failures are counted."""
        for name, row in answers.items():
            self._note_failures(name, row, responses)
        return [self._sum({name: row[index] for name, row in answers.items()}) for index in range(len(responses))]

    def _sum(self, answers: dict[str, float | Failure]) -> Score:
        values = {name: 0.0 if isinstance(answer, Failure) else answer for name, answer in answers.items()}
        total = 0.0
        for name, reward in self._rewards.items():
            gate = reward.gate
            failed = gate is not None and isinstance(answers[gate.reward], Failure)
            if gate is None or (not failed and values[gate.reward] >= gate.at_least):
                total += reward.weight * values[name]
        return total, values

    def _note_failures(self, name: str, answers: list[float | Failure], responses: Sequence[Response]) -> None:
        failures = [(response, a) for response, a in zip(responses, answers, strict=True) if isinstance(a, Failure)]
        self.num_errors += len(failures)
        if failures and name not in self._reported:
            self._reported.add(name)
            response, failure = failures[0]
            logger.error(
                "reward %s failed on %s (%s: %s); it counts as 0, further failures are only counted\n%s",
                name,
                response.prompt.source,
                failure.kind,
                failure.message,
                failure.traceback,
            )


class Scoring:
    """Responses that are scored while more of them come."""

    def __init__(self, rewards: RewardSum) -> None:
        self._rewards, self._lines = rewards, rewards.lines()
        self._responses: list[Response] = []

    def add(self, responses: Sequence[Response]) -> None:
        """Functions that run in processes of their own begin at once; those that run here wait for `results`."""
        self._responses += responses
        for line in self._lines.values():
            line.add(responses)

    def results(self) -> list[Score]:
        """Waits for the last one. For each response, in the order they were added, its score."""
        return self._rewards.totals(self._responses, {name: line.results() for name, line in self._lines.items()})


class _WorkerLine:
    """A function in the scoring processes: a job for each response, so that slow ones spread."""

    def __init__(self, pool: ScoringPool, number: int, seconds: float) -> None:
        self._pool, self._number, self._seconds = pool, number, seconds
        self._jobs: list[Future[list[float | Failure]]] = []

    def add(self, responses: Sequence[Response]) -> None:
        self._jobs += [self._pool.submit(Job(self._number, [response], self._seconds, 0)) for response in responses]

    def results(self) -> list[float | Failure]:
        return [value for job in self._jobs for value in job.result()]


class _OwnLine:
    """A function that runs in this process, all responses one after the other."""

    def __init__(self, function: Callable[..., Any], seconds: float, at_once: int) -> None:
        self._function, self._seconds, self._at_once = function, seconds, at_once
        self._responses: list[Response] = []

    def add(self, responses: Sequence[Response]) -> None:
        self._responses += responses

    def results(self) -> list[float | Failure]:
        found: list[float | Failure] = [0.0] * len(self._responses)
        score(self._function, self._responses, self._seconds, self._at_once, found.__setitem__)
        return found


Line = AsyncLine | _WorkerLine | _OwnLine


def default_workers() -> int:
    """One for each core of this machine that this process may count on among the processes of a launch, up to 8."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(cores, 1), 8)
