"""The reward of a response: reward functions weighed, gated and added up."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from dots_align.config import RewardSection, reward_names
from dots_align.scoring.functions import ModelLoader, load_reward, takes_many
from dots_align.scoring.pool import ScoringPool, split
from dots_align.scoring.worker import Failure, score
from dots_align.types import Response

# As dots_align.runtime's, without its imports: scoring processes pass through here.
logger = logging.getLogger("dots_align")

JOBS_PER_WORKER = 4


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

    def __call__(self, response: Response) -> tuple[float, dict[str, float]]:
        """The sum, and each function's own value."""
        return self.score([response])[0]

    def score(self, responses: Sequence[Response]) -> list[tuple[float, dict[str, float]]]:
        """For each response, in order, the sum and each function's own value (of those behind closed gates too)."""
        answers = self._answers(list(responses))
        for name, row in answers.items():
            self._note_failures(name, row, responses)
        return [self._sum({name: row[index] for name, row in answers.items()}) for index in range(len(responses))]

    def close(self) -> None:
        """Ends the scoring processes."""
        self._pool.close()

    def __enter__(self) -> RewardSum:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, responses: list[Response]) -> dict[str, list[float | Failure]]:
        jobs, owners = [], []
        parts = JOBS_PER_WORKER * self._pool.num_workers
        found: dict[str, list[float | Failure]] = {name: [] for name in self._rewards}
        for number, (name, reward) in enumerate(self._rewards.items()):
            function, seconds, at_once = self._functions[number], reward.timeout_seconds, reward.max_concurrency
            if reward.run_in == "trainer":
                row = found[name] = [0.0] * len(responses)
                score(function, responses, seconds, at_once, row.__setitem__)
            else:
                new = split(number, function, responses, seconds, at_once, parts)
                jobs, owners = jobs + new, owners + [name] * len(new)
        for name, values in zip(owners, self._pool.run(jobs), strict=True):
            found[name] += values
        return found

    def _sum(self, answers: dict[str, float | Failure]) -> tuple[float, dict[str, float]]:
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


def default_workers() -> int:
    """One for each core of this machine that this process may count on among the processes of a launch, up to 8."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(cores, 1), 8)
