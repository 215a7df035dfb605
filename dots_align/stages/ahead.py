"""Rollouts made one step ahead: the batch of the next step is sampled with the weights that the present step starts
from, and, where that can be, while it trains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from dots_align.model.expert_parallel import is_sharded
from dots_align.runtime import world_size
from dots_align.stages.rollouts import Rollouts

Collect = Callable[[int, int], Rollouts]
"""From the step that will train on it, and the steps its policy has trained for, to a batch."""


class Ahead:
    """Batches for one step after the other, each begun one step before it is wanted.

    What comes out does not depend on whether it was made beside the training: `collect` works with weights that do not
    change meanwhile.

    Args:
        collect: makes a batch. prepare: called before each, lets it have the weights of now.
        max_steps: of the run; nothing is begun for steps behind it.
        beside: in a thread of its own; else at once, before the step trains.
    """

    def __init__(self, collect: Collect, prepare: Callable[[], object], max_steps: int, beside: bool) -> None:
        self._collect, self._prepare, self._max_steps = collect, prepare, max_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout") if beside else None
        self._next: Future[Rollouts] | None = None

    def take(self, step: int) -> Rollouts:
        """The batch of a step; that of the next one is begun. Raises: what `collect` raises."""
        if self._next is None:
            self._begin(step, step)
        assert self._next is not None
        rollouts, self._next = self._next.result(), None
        if step + 1 < self._max_steps:
            self._begin(step + 1, step)
        return rollouts

    def waiting(self) -> Rollouts | None:
        """The batch of the next step, once it is there; for a checkpoint."""
        return None if self._next is None else self._next.result()

    def close(self) -> None:
        """Waits for a batch that is in the making; nobody will take it."""
        if self._thread is not None:
            self._thread.shutdown()

    def put_back(self, rollouts: Rollouts | None) -> None:
        """What `waiting` gave before a checkpoint was written."""
        if rollouts is not None:
            self._next = Future()
            self._next.set_result(rollouts)

    def _begin(self, step: int, version: int) -> None:
        self._prepare()
        if self._thread is not None:
            self._next = self._thread.submit(self._collect, step, version)
        else:
            self._next = Future()
            self._next.set_result(self._collect(step, version))


def can_be_beside(policy: Any, backend: str) -> bool:
    """Whether rollouts can be made while the policy trains: over several processes their collectives would meet those
    of the training, and a sharded model cannot be copied.
    """
    return world_size() == 1 and (backend != "local" or not is_sharded(policy))


def copy_of(policy: Any) -> Any:
    """A copy to roll out with; what is frozen is shared. To be made before anything watches the policy with hooks."""
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False)


def bring_up_to_date(copied: Any, policy: Any) -> None:
    """Gives a copy the policy's present weights and buffers."""
    with torch.no_grad():
        for theirs, ours in (
            *zip(copied.parameters(), policy.parameters(), strict=True),
            *zip(copied.buffers(), policy.buffers(), strict=True),
        ):
            if theirs is not ours:
                theirs.copy_(ours)
