"""Many prompts through one engine: fed as it has room, each one's samples handed on when the last of them is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from dots_align.model.expert_parallel import is_sharded
from dots_align.rollout.engine import Failed, RolloutEngine
from dots_align.runtime import sum_over_processes
from dots_align.types import GenerationRequest, Sample


class BulkSampler:
    """Samples requests in about the order they are given.

    Only as many as keep the engine busy are in line at any time: of a million samples most are a number here.

    Args:
        engine: one that nobody else uses. Of a sharded model every process has its own, with its own requests or none.
        return_routes: keep the experts each token chose.
    """

    def __init__(self, engine: RolloutEngine, return_routes: bool = False) -> None:
        self.engine, self.return_routes = engine, return_routes
        self.most_in_line = 2 * engine.scheduler.rows.count
        self.in_line = 0
        """Samples that have not ended."""
        self._places: dict[int, int] = {}
        self._samples: dict[int, dict[int, Sample]] = {}
        self._wanted: dict[int, int] = {}

    def run(self, requests: Iterable[tuple[int, GenerationRequest | str]]) -> Iterator[tuple[int, list[Sample] | str]]:
        """Takes (place, request) one by one and gives (place, its samples) in the order in which they are done. A text
        in place of a request or of samples says why there are none.
        """
        source = iter(requests)
        following = next(source, None)
        with self.engine.session():
            while self._anyone(following is not None or self.engine.has_work):
                while following is not None and self.in_line < self.most_in_line:
                    yield from self._submit(*following)
                    following = next(source, None)
                for event in self.engine.step():
                    if isinstance(event, Failed):
                        yield self._drop(event)
                    else:
                        yield from self._take(event.request, event.index, event.sample)
        self.engine.sleep()

    def _submit(self, place: int, request: GenerationRequest | str) -> Iterator[tuple[int, str]]:
        refusal = request if isinstance(request, str) else self.engine.refusal(request)
        if isinstance(request, str) or refusal is not None:
            yield place, str(refusal)
            return
        number = self.engine.submit(request, self.return_routes)
        self._places[number], self._samples[number], self._wanted[number] = place, {}, request.num_samples
        self.in_line += request.num_samples

    def _drop(self, failed: Failed) -> tuple[int, str]:
        self.in_line -= self._wanted.pop(failed.request) - len(self._samples.pop(failed.request))
        return self._places.pop(failed.request), failed.message

    def _take(self, number: int, index: int, sample: Sample) -> Iterator[tuple[int, list[Sample]]]:
        samples = self._samples[number]
        samples[index] = sample
        self.in_line -= 1
        if len(samples) == self._wanted[number]:
            del self._samples[number], self._wanted[number]
            yield self._places.pop(number), [samples[i] for i in sorted(samples)]

    def _anyone(self, busy: bool) -> bool:
        """Whether this process, or one that computes with it, has work left."""
        if not is_sharded(self.engine.model):
            return busy
        flag = torch.tensor(int(busy))
        sum_over_processes(flag)
        return bool(flag)
