"""Who runs next: requests wait in line, groups take free slots, sequences leave when they stop, slots are used again.

All per-sequence state is in tensors over the R = groups x group_size rows, so a decode step touches no sequence from
Python; only admission and leaving do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from dots_align.rollout.sampling import SamplingTable, sample_keys
from dots_align.types import GenerationRequest, Sample


@dataclass(frozen=True)
class Admission:
    """One prompt entering group slot `slot`: samples `first ... first + count - 1` of request `request`."""

    slot: int
    request: int
    first: int
    count: int


class Scheduler:
    """Row state [R] of a running batch and the queue before it.

    Args:
        requests: what to generate; each may ask for more samples than fit one group slot, then it takes several.
        num_groups, group_size: the slots (G) and the rows of each (W).
        suffix_capacity: T, the longest response that the cache can hold.
        keep_routes: (layers, k) to keep routes of that shape, or None.
    """

    def __init__(
        self,
        requests: list[GenerationRequest],
        num_groups: int,
        group_size: int,
        suffix_capacity: int,
        device: torch.device,
        keep_routes: tuple[int, int] | None = None,
    ) -> None:
        self.requests, self.width, self.device = requests, group_size, device
        self.waiting: deque[tuple[int, int, int]] = deque()
        for index, request in enumerate(requests):
            for first in range(0, request.num_samples, group_size):
                self.waiting.append((index, first, min(group_size, request.num_samples - first)))
        self.free_slots = deque(range(num_groups))
        rows = num_groups * group_size
        longest_stop = max((len(r.sampling.stop_token_ids) for r in requests), default=0)

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.active = zeros(rows, dtype=torch.bool)
        self.prompt_lengths, self.lengths, self.max_tokens = zeros(rows), zeros(rows), zeros(rows)
        self.request_of, self.sample_of = zeros(rows), zeros(rows)
        self.stop_ids = torch.full((rows, max(longest_stop, 1)), -1, device=device)
        self.sampling = SamplingTable(
            zeros(rows, dtype=torch.float32), zeros(rows, dtype=torch.float32), zeros(rows), zeros(rows)
        )
        self.tokens = zeros(rows, suffix_capacity)
        self.rollout_logprobs = zeros(rows, suffix_capacity, dtype=torch.float32)
        self.logprobs = zeros(rows, suffix_capacity, dtype=torch.float32)
        self.row_routes = zeros(rows, suffix_capacity, *keep_routes, dtype=torch.uint8) if keep_routes else None
        self.prompt_routes: dict[int, torch.Tensor] = {}
        self.samples: list[dict[int, Sample]] = [{} for _ in requests]

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or bool(self.active.any())

    def active_rows(self) -> torch.Tensor:
        return self.active.nonzero().squeeze(-1)

    def admit(self) -> list[Admission]:
        """Moves waiting prompts into free slots, first come first served."""
        admitted = []
        while self.waiting and self.free_slots:
            request, first, count = self.waiting.popleft()
            admission = Admission(self.free_slots.popleft(), request, first, count)
            self._occupy(admission)
            admitted.append(admission)
        return admitted

    def rows_of(self, admission: Admission) -> torch.Tensor:
        start = admission.slot * self.width
        return torch.arange(start, start + admission.count, device=self.device)

    def _occupy(self, admission: Admission) -> None:
        rows, request = self.rows_of(admission), self.requests[admission.request]
        sampling = request.sampling
        self.active[rows] = True
        self.lengths[rows] = 0
        self.prompt_lengths[rows] = len(request.prompt_ids)
        self.max_tokens[rows] = sampling.max_tokens
        self.request_of[rows] = admission.request
        self.sample_of[rows] = torch.arange(admission.first, admission.first + admission.count, device=self.device)
        self.stop_ids[rows] = -1
        self.stop_ids[rows, : len(sampling.stop_token_ids)] = torch.tensor(
            sampling.stop_token_ids, device=self.device, dtype=torch.long
        )
        self.sampling.temperature[rows] = sampling.temperature
        self.sampling.top_p[rows] = sampling.top_p
        self.sampling.top_k[rows] = sampling.top_k
        seed = (sampling.seed + 2**63) % 2**64 - 2**63  # any Python integer, wrapped into int64
        seeds = torch.full((len(rows),), seed, device=self.device)
        self.sampling.keys[rows] = sample_keys(seeds, self.sample_of[rows])

    def append(
        self, rows: torch.Tensor, tokens: torch.Tensor, rollout_logprobs: torch.Tensor, logprobs: torch.Tensor
    ) -> int:
        """Records one sampled token for each of `rows` [N]; sequences that ended leave. Returns how many left."""
        at = self.lengths[rows]
        self.tokens[rows, at] = tokens
        self.rollout_logprobs[rows, at] = rollout_logprobs
        self.logprobs[rows, at] = logprobs
        self.lengths[rows] = at + 1
        stopped = (tokens[:, None] == self.stop_ids[rows]).any(-1)
        ended = stopped | (at + 1 >= self.max_tokens[rows])
        leaving = rows[ended].tolist()
        for row, stop in zip(leaving, stopped[ended].tolist(), strict=True):
            self._leave(row, "stop" if stop else "length")
        return len(leaving)

    def _leave(self, row: int, finish_reason: str) -> None:
        length, slot = int(self.lengths[row]), row // self.width
        self.active[row] = False
        routes = None
        if self.row_routes is not None:
            # The last token was sampled but never fed, so it has no route.
            fed = torch.cat([self.prompt_routes[slot], self.row_routes[row, : length - 1]])
            routes = fed.cpu().numpy().tobytes()
        self.samples[int(self.request_of[row])][int(self.sample_of[row])] = Sample(
            self.tokens[row, :length].tolist(),
            self.rollout_logprobs[row, :length].tolist(),
            self.logprobs[row, :length].tolist(),
            finish_reason,
            routes,
        )
        if not bool(self.active[slot * self.width : (slot + 1) * self.width].any()):
            self.free_slots.append(slot)

    def results(self) -> list[list[Sample]]:
        """Samples of each request, in the order of their index."""
        return [[by_index[i] for i in sorted(by_index)] for by_index in self.samples]
