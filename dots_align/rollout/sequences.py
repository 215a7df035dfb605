"""What the engine knows of its sequences: those that wait as records, those that run as rows of arrays.

All per-sequence state of running sequences is in host arrays over R rows, so a decode step touches no sequence from
Python; only entering and leaving do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dots_align.rollout.sampling import SamplingTable, sample_keys
from dots_align.types import GenerationRequest, Sample


@dataclass
class Progress:
    """A sample without a row: not begun, put back, or handed over by another run."""

    request: int
    index: int
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    rollout_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    routes: np.ndarray | None = None  # [response tokens fed so far, layers, k]
    prompt_routes: np.ndarray | None = None  # [prompt tokens, layers, k] of a sample begun elsewhere

    @staticmethod
    def of(request: int, index: int, prompt_length: int, sample: Sample, shape: tuple[int, int]) -> Progress:
        """Where a sample begun earlier stands; `shape` is (layers, k) of its routes, if it has any."""
        routes = None
        if sample.routes is not None:
            routes = np.frombuffer(sample.routes, np.uint8).reshape(-1, *shape)
        return Progress(
            request,
            index,
            np.asarray(sample.response_ids, np.int32),
            np.asarray(sample.rollout_logprobs, np.float32),
            np.asarray(sample.logprobs, np.float32),
            None if routes is None else routes[prompt_length:],
            None if routes is None else routes[:prompt_length],
        )

    def sample(self, finish_reason: str, prompt_routes: np.ndarray | None) -> Sample:
        """The record of it; routes cover the prompt and all response tokens but the last, or there are none."""
        routes, fed = None, len(self.tokens) - 1
        if self.routes is not None and prompt_routes is not None and len(self.routes) >= fed >= 0:
            routes = prompt_routes.tobytes() + self.routes[:fed].tobytes()
        return Sample(
            self.tokens.tolist(), self.rollout_logprobs.tolist(), self.logprobs.tolist(), finish_reason, routes
        )


class Rows:
    """State of R running sequences, one array entry or row each; what a free row holds means nothing.

    `length` counts response tokens, `computed` how many of them have keys in the cache. `order` is the number of the
    admission: who came last goes first when memory runs out.
    """

    def __init__(self, count: int, block_size: int, route_shape: tuple[int, int]) -> None:
        self.count, self.block_size, self.route_shape = count, block_size, route_shape

        def zeros(dtype: type = np.int64) -> np.ndarray:
            return np.zeros(count, dtype)

        self.active = zeros(np.bool_)
        self.request, self.index, self.prefix, self.order = zeros(), zeros(), zeros(), zeros()
        self.length, self.computed, self.num_blocks, self.max_tokens = zeros(), zeros(), zeros(), zeros()
        self.num_recorded = zeros()  # response tokens whose routes are known
        self.temperature, self.top_p, self.min_p = zeros(np.float32), zeros(np.float32), zeros(np.float32)
        self.top_k, self.keys = zeros(), zeros()
        self.stop_ids = np.full((count, 1), -1, np.int32)
        self.tables = np.zeros((count, 1), np.int32)
        self.tokens = np.zeros((count, 1), np.int32)
        self.rollout_logprobs = np.zeros((count, 1), np.float32)
        self.logprobs = np.zeros((count, 1), np.float32)
        self.routes: np.ndarray | None = None
        self.prompt_routes: list[np.ndarray | None] = [None] * count

    def make_space(self, request: GenerationRequest, with_routes: bool) -> None:
        """Widens the arrays so that a sequence of this request fits."""
        tokens = request.sampling.max_tokens
        self.stop_ids = _widened(self.stop_ids, len(request.sampling.stop_token_ids), -1)
        self.tables = _widened(self.tables, -(-tokens // self.block_size), 0)
        self.tokens = _widened(self.tokens, tokens, 0)
        self.rollout_logprobs = _widened(self.rollout_logprobs, tokens, 0)
        self.logprobs = _widened(self.logprobs, tokens, 0)
        if with_routes or self.routes is not None:
            routes = np.zeros((self.count, 1, *self.route_shape), np.uint8) if self.routes is None else self.routes
            self.routes = _widened(routes, tokens, 0)

    def enter(self, rows: np.ndarray, request: GenerationRequest, members: list[Progress]) -> None:
        """Fills rows [n] with n sequences of one request; the caller sets `prefix`, `order` and the blocks."""
        sampling, n = request.sampling, len(rows)
        self.request[rows] = members[0].request
        self.index[rows] = indices = np.array([m.index for m in members])
        self.computed[rows] = self.num_blocks[rows] = 0
        self.max_tokens[rows] = sampling.max_tokens
        self.temperature[rows], self.top_p[rows] = sampling.temperature, sampling.top_p
        self.top_k[rows], self.min_p[rows] = sampling.top_k, sampling.min_p
        self.stop_ids[rows] = -1
        self.stop_ids[rows, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        seed = (sampling.seed + 2**63) % 2**64 - 2**63  # any Python integer, wrapped into int64
        self.keys[rows] = sample_keys(torch.full((n,), seed), torch.from_numpy(indices)).numpy()
        self.length[rows] = [len(m.tokens) for m in members]
        self.num_recorded[rows] = [0 if m.routes is None else len(m.routes) for m in members]
        for row, member in zip(rows.tolist(), members, strict=True):
            self.prompt_routes[row] = member.prompt_routes
            if length := len(member.tokens):
                self.tokens[row, :length] = member.tokens
                self.rollout_logprobs[row, :length] = member.rollout_logprobs
                self.logprobs[row, :length] = member.logprobs
                if self.routes is not None and member.routes is not None:
                    self.routes[row, : len(member.routes)] = member.routes
        self.active[rows] = True

    def leave(self, row: int) -> Progress:
        """Empties a row; what it had said so far."""
        self.active[row] = False
        length = int(self.length[row])
        routes = None
        if self.routes is not None:
            routes = self.routes[row, : int(self.num_recorded[row])].copy()
        return Progress(
            int(self.request[row]),
            int(self.index[row]),
            self.tokens[row, :length].copy(),
            self.rollout_logprobs[row, :length].copy(),
            self.logprobs[row, :length].copy(),
            routes,
            self.prompt_routes[row],
        )

    def blocks(self, row: int) -> np.ndarray:
        return self.tables[row, : int(self.num_blocks[row])].copy()

    def add_blocks(self, row: int, blocks: np.ndarray) -> None:
        """Gives a row more blocks. Entries behind its last one name its first: of another sequence's block even what is
        masked could be NaN.
        """
        held = int(self.num_blocks[row])
        if held == 0:
            self.tables[row] = blocks[0]
        self.tables[row, held : held + len(blocks)] = blocks
        self.num_blocks[row] = held + len(blocks)

    def add_block_each(self, rows: np.ndarray, blocks: np.ndarray) -> None:
        """One more block for each of rows [n]."""
        held = self.num_blocks[rows]
        first = rows[held == 0]
        self.tables[first] = blocks[held == 0][:, None]
        self.tables[rows, held] = blocks
        self.num_blocks[rows] = held + 1

    def sampling_table(self, rows: np.ndarray, device: torch.device) -> SamplingTable:
        def take(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values[rows]).to(device)

        filtered = (self.top_p[rows] < 1).any() or (self.top_k[rows] > 0).any() or (self.min_p[rows] > 0).any()
        tempered = (self.temperature[rows] != 1).any()
        return SamplingTable(
            take(self.temperature),
            take(self.top_p),
            take(self.top_k),
            take(self.min_p),
            take(self.keys),
            bool(filtered),
            bool(tempered),
        )

    def append(
        self, rows: np.ndarray, tokens: np.ndarray, rollout_logprobs: np.ndarray, logprobs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Records one sampled token for each of rows [n]; returns those that ended and which by a stop token."""
        at = self.length[rows]
        self.tokens[rows, at] = tokens
        self.rollout_logprobs[rows, at] = rollout_logprobs
        self.logprobs[rows, at] = logprobs
        self.length[rows] = at + 1
        stopped = (tokens[:, None] == self.stop_ids[rows]).any(-1)
        ended = stopped | (at + 1 >= self.max_tokens[rows])
        return rows[ended], stopped[ended]


def _widened(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    """The same rows with room for at least `width` entries."""
    have = array.shape[1]
    if have >= width:
        return array
    wide = np.zeros if fill == 0 else np.ones  # zeros take memory only where they are written
    out = wide((array.shape[0], max(width, min(2 * have, 2 * width)), *array.shape[2:]), array.dtype)
    if fill:
        out *= fill
    out[:, :have] = array
    return out
