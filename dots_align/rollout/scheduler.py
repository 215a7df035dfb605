"""Who runs next: samples wait in line, take rows as these become free, give way when memory runs out, and leave.

Memory is counted in blocks. A prompt's blocks are taken when the first of its samples gets a row and shared by all of
them; where another prompt that is in the cache begins alike, they are given back for those that hold its beginning.
A sample takes blocks as it grows. If none are left, the sample that came last is put back to the head of the line, and
when it gets a row again its tokens are read once more. The sample that came first is never put back for another, so
that whatever fits alone gets done.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from dots_align.rollout.kv_cache import BlockPool
from dots_align.rollout.plan import ForwardPlan, find_trunks
from dots_align.rollout.prefix_cache import Key, PrefixCache
from dots_align.rollout.sequences import Progress, Rows
from dots_align.types import GenerationRequest, Sample


@dataclass(frozen=True)
class Finished:
    """A sample that ended: number `index` of request `request`, as counted by `submit`."""

    request: int
    index: int
    sample: Sample


@dataclass
class Prefix:
    """A prompt in the cache."""

    request: int
    tokens: np.ndarray
    blocks: np.ndarray
    computed: int = 0
    reused: int = 0
    """Tokens at its beginning that were read for another prompt."""
    rows: int = 0
    """Running samples that hang on it; with none it stays only as long as nobody needs its memory."""
    logits: torch.Tensor | None = None
    """[V] after its last token, while samples have yet to begin."""
    routes: np.ndarray | None = None

    @property
    def ready(self) -> bool:
        return self.computed == len(self.tokens)


@dataclass(frozen=True)
class Step:
    """A plan and what it is for: `prompts` are (prefix slot, tokens read) in the order of the plan's first chains,
    `rows` [n] with `counts` [n] tokens each the chains after them.
    """

    plan: ForwardPlan
    prompts: list[tuple[int, int]]
    rows: np.ndarray
    counts: np.ndarray
    ends_rows: np.ndarray
    """The rows among `rows` whose next token the forward decides; their logits come after those of prompts."""
    ends_prompts: list[int]
    """Prefix slots that are ready after it; their logits come first."""


class Scheduler:
    """The samples of all requests, the rows they run in and the blocks they hold.

    Args:
        num_rows: how many sequences decode at once.
        chunk_tokens: the most prompt tokens (or tokens read again) of one forward.
        route_shape: (MoE layers, k) of the routes of a token.
    """

    def __init__(self, num_rows: int, block_size: int, chunk_tokens: int, route_shape: tuple[int, int]) -> None:
        self.rows = Rows(num_rows, block_size, route_shape)
        self.block_size, self.chunk_tokens = block_size, chunk_tokens
        self.pool: BlockPool | None = None
        self.requests: dict[int, GenerationRequest] = {}
        self.with_routes: dict[int, bool] = {}
        self.waiting: deque[Progress] = deque()
        self.waiting_of: Counter[int] = Counter()
        self.prefixes: list[Prefix | None] = [None] * num_rows
        self.slot_of: dict[int, int] = {}
        self.prefix_tables = np.zeros((num_rows, 1), np.int32)
        self.prefix_lengths = np.zeros(num_rows, np.int32)
        self.prefix_ready = np.zeros(num_rows, np.bool_)
        self.prefix_cache = PrefixCache(block_size)
        self.num_admitted = self.num_preempted = 0

    # ------------------------------------------------------------------------------------------------ in and out

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or bool(self.rows.active.any())

    def blocks_needed(self, request: GenerationRequest) -> int:
        """Blocks with which one sample of a request can always be done."""
        return self._blocks(len(request.prompt_ids)) + self._blocks(request.sampling.max_tokens)

    def most_blocks(self) -> int:
        """Blocks with which nothing that is known now would ever have to give way."""
        rows, requests = self.rows.count, list(self.requests.values())
        samples = min(rows, sum(r.num_samples for r in requests))
        prompts = min(rows, len(requests))
        return samples * max((self._blocks(r.sampling.max_tokens) for r in requests), default=0) + prompts * max(
            (self._blocks(len(r.prompt_ids)) for r in requests), default=0
        )

    def add(self, number: int, request: GenerationRequest, with_routes: bool) -> list[Finished]:
        """Puts a request's samples in line; returns those of `started` that had ended already."""
        self.requests[number], self.with_routes[number] = request, with_routes
        self.rows.make_space(request, with_routes)
        ended = []
        for index in range(request.num_samples):
            begun = request.started[index] if index < len(request.started) else None
            if begun is not None and (begun.finish_reason != "abort" or self._is_full(begun, request)):
                ended.append(Finished(number, index, begun))
                continue
            member = Progress(number, index)
            if begun is not None:
                member = Progress.of(number, index, len(request.prompt_ids), begun, self.rows.route_shape)
            self.waiting.append(member)
            self.waiting_of[number] += 1
        if not self.waiting_of[number]:
            self._forget(number)
        return ended

    @staticmethod
    def _is_full(begun: Sample, request: GenerationRequest) -> bool:
        return len(begun.response_ids) >= request.sampling.max_tokens

    def remove(self, number: int, erase: bool = False) -> list[Finished]:
        """Takes all unfinished samples of a request out, as they stand; `erase` cleans the memory they leave."""
        members = [m for m in self.waiting if m.request == number]
        self.waiting = deque(m for m in self.waiting if m.request != number)
        self.waiting_of[number] = 0
        slot = self.slot_of.get(number)
        of_prompt = None if slot is None else self._prompt_routes(slot)
        for row in np.nonzero(self.rows.active & (self.rows.request == number))[0].tolist():
            members.append(self._vacate(row, erase))
        found = [
            Finished(number, m.index, m.sample("abort", of_prompt if m.prompt_routes is None else m.prompt_routes))
            for m in members
        ]
        if number in self.slot_of:
            self._drop_prefix(self.slot_of[number], erase)
        self._forget(number)
        return sorted(found, key=lambda f: f.index)

    def put_all_back(self) -> None:
        """Every running sample waits again, and nothing is left in the cache."""
        rows = np.nonzero(self.rows.active)[0]
        for row in rows[np.argsort(-self.rows.order[rows])].tolist():
            self._put_back(row)
        for slot in list(self.slot_of.values()):
            self._drop_prefix(slot)

    def _forget(self, number: int) -> None:
        del self.requests[number], self.with_routes[number], self.waiting_of[number]

    # ---------------------------------------------------------------------------------------------------- admission

    def admit(self) -> None:
        """Gives free rows to those who wait, first come first served, as far as there is memory."""
        free = np.nonzero(~self.rows.active)[0].tolist()
        while free and self.waiting:
            taken = self._admit_group(free)
            if taken == 0:
                return
            del free[:taken]

    def _admit_group(self, free: list[int]) -> int:
        """Rows for the samples at the head of the line that answer the same prompt; returns how many got one."""
        number = self.waiting[0].request
        request = self.requests[number]
        members: list[Progress] = []
        while len(members) < len(free) and self.waiting and self.waiting[0].request == number:
            member = self.waiting[0]
            if not self._has_room_for(request, [*members, member]):
                break
            members.append(self.waiting.popleft())
        if not members:
            return 0
        rows = np.array(free[: len(members)])
        self.waiting_of[number] -= len(members)
        slot = self._take_prefix(number, request)
        self.rows.enter(rows, request, members)
        self.rows.prefix[rows] = slot
        self.rows.order[rows] = np.arange(self.num_admitted, self.num_admitted + len(rows))
        self.num_admitted += len(rows)
        prefix = self.prefixes[slot]
        assert prefix is not None
        assert self.pool is not None
        prefix.rows += len(rows)
        for row in rows[self.rows.length[rows] > 0].tolist():  # to be read again, in one go or in several
            self.rows.add_blocks(row, self.pool.take(self._blocks(int(self.rows.length[row]))))
        return len(rows)

    def _has_room_for(self, request: GenerationRequest, members: list[Progress]) -> bool:
        """Whether there is memory for what the members bring, one block more for each, and one for each that runs."""
        assert self.pool is not None
        need = sum(max(self._blocks(len(m.tokens)), 1) for m in members)
        if members[0].request not in self.slot_of:
            need += self._blocks(len(request.prompt_ids))
        running = int(self.rows.active.sum())
        if need + running <= self.pool.num_free:
            return True
        self._evict_idle(need + running, keep=members[0].request)
        return need + running <= self.pool.num_free

    def _take_prefix(self, number: int, request: GenerationRequest) -> int:
        if number in self.slot_of:
            return self.slot_of[number]
        if None not in self.prefixes:  # one of them is idle: fewer than all rows run
            self._drop_prefix(next(i for i, p in enumerate(self.prefixes) if p is not None and p.rows == 0))
        slot = self.prefixes.index(None)
        assert self.pool is not None
        tokens = np.asarray(request.prompt_ids, np.int32)
        blocks = self.pool.take(self._blocks(len(tokens)))
        self.prefixes[slot] = prefix = Prefix(number, tokens, blocks)
        if self.with_routes[number]:
            prefix.routes = np.zeros((len(tokens), *self.rows.route_shape), np.uint8)
        if self.prefix_tables.shape[1] < len(blocks):
            wider = np.zeros((len(self.prefixes), len(blocks)), np.int32)
            wider[:, : self.prefix_tables.shape[1]] = self.prefix_tables
            self.prefix_tables = wider
        self._enter_blocks(slot, blocks)
        self.prefix_lengths[slot], self.prefix_ready[slot] = len(tokens), False
        self.slot_of[number] = slot
        return slot

    def _enter_blocks(self, slot: int, blocks: np.ndarray) -> None:
        """A prompt's blocks, for plans. Entries behind its last one name its first, as in `Rows.add_blocks`."""
        self.prefix_tables[slot] = blocks[0]
        self.prefix_tables[slot, : len(blocks)] = blocks

    def _reuse(self, slot: int, prefix: Prefix) -> None:
        """Lets a prompt that has nothing of its own in the cache yet begin with what was read for others."""
        if prefix.computed > prefix.reused:
            return
        found = self.prefix_cache.find(prefix.tokens, prefix.routes is not None)
        had = prefix.reused // self.block_size
        if len(found) <= had:
            return
        assert self.pool is not None
        blocks, own = np.array(found, np.int32), len(prefix.blocks) - len(found)
        self.pool.share(blocks[had:])
        self._release(prefix.blocks[had:], erase=False)
        prefix.blocks = np.concatenate([blocks, self.pool.take(own)])  # not those: they lie far from each other
        self.prefix_cache.num_reused += (len(found) - had) * self.block_size
        prefix.computed = prefix.reused = len(found) * self.block_size
        if prefix.routes is not None:
            prefix.routes[: prefix.reused] = self.prefix_cache.routes(found)
        self._enter_blocks(slot, prefix.blocks)

    # ------------------------------------------------------------------------------------------------------- memory

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _evict_idle(self, wanted: int, keep: int | None = None) -> None:
        """Lets go of prompts nobody runs on until `wanted` blocks are free."""
        assert self.pool is not None
        for slot, prefix in enumerate(self.prefixes):
            if self.pool.num_free >= wanted:
                return
            if prefix is not None and prefix.rows == 0 and prefix.request != keep:
                self._drop_prefix(slot)

    def _drop_prefix(self, slot: int, erase: bool = False) -> None:
        prefix = self.prefixes[slot]
        assert prefix is not None
        assert prefix.rows == 0
        self._release(prefix.blocks, erase)
        self.prefixes[slot] = None
        self.prefix_ready[slot] = False
        del self.slot_of[prefix.request]

    def _release(self, blocks: np.ndarray, erase: bool) -> None:
        assert self.pool is not None
        free = self.pool.give_back(blocks)
        self.prefix_cache.forget(free)
        if erase and len(free):
            self.pool.erase(free)

    def _vacate(self, row: int, erase: bool = False) -> Progress:
        """Takes a sequence out of its row and frees its blocks, and its prompt's if nobody will need them."""
        self._release(self.rows.blocks(row), erase)
        progress = self.rows.leave(row)
        slot = int(self.rows.prefix[row])
        prefix = self.prefixes[slot]
        assert prefix is not None
        prefix.rows -= 1
        return progress

    def _put_back(self, row: int) -> None:
        prefix = self.prefixes[int(self.rows.prefix[row])]
        progress = self._vacate(row)
        if progress.prompt_routes is None and prefix is not None and prefix.ready:
            progress.prompt_routes = prefix.routes
        self.waiting.appendleft(progress)
        self.waiting_of[progress.request] += 1
        self.num_preempted += 1

    def _grow(self, rows: np.ndarray) -> np.ndarray:
        """A new block for each of rows [n] that is about to write the first token of one; the rows that still run."""
        assert self.pool is not None
        while True:
            full = rows[self.rows.computed[rows] >= self.rows.num_blocks[rows] * self.block_size]
            if len(full) > self.pool.num_free:
                self._evict_idle(len(full))
            if len(full) <= self.pool.num_free:
                self.rows.add_block_each(full, self.pool.take(len(full)))
                return rows
            active = np.nonzero(self.rows.active)[0]
            self._put_back(int(active[np.argmax(self.rows.order[active])]))
            rows = rows[self.rows.active[rows]]

    # --------------------------------------------------------------------------------------------------------- plan

    def plan(self) -> Step | None:
        """The next forward: a token for every running sequence, and a chunk of what has yet to be read."""
        rows = self.rows
        if not rows.active.any():
            return None
        behind = rows.length - rows.computed
        can_run = rows.active & (behind > 0) & self.prefix_ready[rows.prefix]
        decoding = self._grow(np.nonzero(can_run & (behind == 1))[0])
        room = self.chunk_tokens
        chosen, counts = decoding, np.ones(len(decoding), np.int64)
        for row in np.nonzero(can_run & (behind > 1) & rows.active)[0].tolist():  # active: _grow may have put some back
            if room > 0:
                count = min(int(behind[row]), room)
                room -= count
                chosen, counts = np.append(chosen, row), np.append(counts, count)
        prompts = self._prompts_to_read(room)
        if not prompts and not len(chosen):
            return None
        return self._step(prompts, chosen, counts)

    def _prompts_to_read(self, room: int) -> list[tuple[int, int]]:
        """(prefix slot, tokens) to read next, `room` in all. What goes on as another one does waits until that has been
        read.
        """
        prompts, being_read = [], set[Key]()
        for slot, prefix in enumerate(self.prefixes):
            if prefix is None or prefix.ready or not prefix.rows or room <= 0:
                continue
            self._reuse(slot, prefix)
            next_key = self.prefix_cache.next_key(prefix.tokens, prefix.blocks, prefix.computed)
            if next_key in being_read and prefix.computed == prefix.reused:
                continue
            count = min(len(prefix.tokens) - prefix.computed, room)
            room -= count
            prompts.append((slot, count))
            if next_key is not None and count >= self.block_size:
                being_read.add(next_key)
        return prompts

    def _step(self, prompts: list[tuple[int, int]], chosen: np.ndarray, counts: np.ndarray) -> Step:
        rows = self.rows
        pieces = [(p, count) for slot, count in prompts if (p := self.prefixes[slot]) is not None]
        slots, prefix_of = np.unique(rows.prefix[chosen], return_inverse=True)
        found, *trunks = find_trunks(self._prefix_tables(slots), self.prefix_lengths[slots], self.block_size)
        slots, prefix_of = slots[found], np.argsort(found)[prefix_of]
        order = np.argsort(prefix_of, kind="stable")
        chosen, counts = chosen[order], counts[order]
        computed = rows.computed[chosen]
        of_chain = np.repeat(np.arange(len(chosen)), counts)
        ends = np.cumsum(counts)
        within = np.arange(len(of_chain)) - (ends - counts)[of_chain] + computed[of_chain]
        row_tokens = rows.tokens[chosen[of_chain], within]
        row_positions = self.prefix_lengths[rows.prefix[chosen]][of_chain] + within
        prompt_counts = np.array([count for _, count in pieces], np.int64)
        num_prompt_tokens = int(prompt_counts.sum())
        first = np.searchsorted(prefix_of[order], np.arange(len(slots)))
        starts = np.concatenate([[0], np.cumsum(np.concatenate([prompt_counts, counts]))])
        ends_row = computed + counts == rows.length[chosen]
        ready = [p.computed + count == len(p.tokens) for p, count in pieces]
        wanted = np.concatenate([np.array(ready, np.bool_), ends_row])
        plan = ForwardPlan(
            tokens=_ints([*(p.tokens[p.computed : p.computed + n] for p, n in pieces), row_tokens]),
            positions=_ints([*(np.arange(p.computed, p.computed + n) for p, n in pieces), row_positions]),
            starts=_ints([starts]),
            cached=_ints([[p.computed for p, _ in pieces], computed]),
            tables=self._tables([slot for slot, _ in prompts], chosen, counts),
            prefix_starts=_ints([(ends - counts)[first] + num_prompt_tokens, [starts[-1]]]),
            prefix_tables=self._prefix_tables(slots),
            prefix_lengths=self.prefix_lengths[slots],
            logits_at=_ints([starts[1:][wanted] - 1]),
            trunk_starts=trunks[0],
            trunk_lengths=trunks[1],
        )
        done = [slot for (slot, _), is_ready in zip(prompts, ready, strict=True) if is_ready]
        return Step(plan, prompts, chosen, counts, chosen[ends_row], done)

    def _tables(self, slots: list[int], chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """[C, B] blocks of the chains: prompts, then rows, as wide as the longest needs."""
        in_use = [self._blocks(len(p.tokens)) for s in slots if (p := self.prefixes[s]) is not None]
        if len(chosen):
            in_use.append(self._blocks(int((self.rows.computed[chosen] + counts).max())))
        width = max(in_use)
        out = np.empty((len(slots) + len(chosen), width), np.int32)
        for at, (source, index) in ((0, (self.prefix_tables, slots)), (len(slots), (self.rows.tables, chosen))):
            part = source[index, :width]
            out[at : at + len(part), : part.shape[1]] = part
            if part.shape[1] < width:
                out[at : at + len(part), part.shape[1] :] = part[:, :1]
        return out

    def _prefix_tables(self, slots: np.ndarray) -> np.ndarray:
        width = self._blocks(int(self.prefix_lengths[slots].max())) if len(slots) else 1
        return np.ascontiguousarray(self.prefix_tables[slots, :width])

    # -------------------------------------------------------------------------------------------------------- after

    def advance(self, step: Step, logits: torch.Tensor, routes: np.ndarray | None) -> None:
        """Takes note of a forward: logits [M, V] and routes [N, layers, k] as the plan asked for."""
        at = 0
        for slot, count in step.prompts:
            prefix = self.prefixes[slot]
            assert prefix is not None
            if prefix.routes is not None and routes is not None:
                prefix.routes[prefix.computed : prefix.computed + count] = routes[at : at + count]
            self.prefix_cache.add(prefix.tokens, prefix.blocks, prefix.computed, prefix.computed + count, prefix.routes)
            prefix.computed += count
            at += count
        for number, slot in enumerate(step.ends_prompts):
            prefix = self.prefixes[slot]
            assert prefix is not None
            prefix.logits = logits[number].clone()  # not a view, which would keep those of all others
            self.prefix_ready[slot] = True
        if self.rows.routes is not None and routes is not None:
            self._record_routes(step, routes[at:])
        self.rows.computed[step.rows] += step.counts

    def _record_routes(self, step: Step, routes: np.ndarray) -> None:
        """Keeps the routes of tokens that have none yet: what is read again may, at a tie, go another way."""
        rows = self.rows
        assert rows.routes is not None
        of_chain = np.repeat(np.arange(len(step.rows)), step.counts)
        starts = np.cumsum(step.counts) - step.counts
        within = np.arange(len(of_chain)) - starts[of_chain] + rows.computed[step.rows][of_chain]
        new = within >= rows.num_recorded[step.rows][of_chain]
        rows.routes[step.rows[of_chain][new], within[new]] = routes[new]
        rows.num_recorded[step.rows] = np.maximum(rows.num_recorded[step.rows], rows.computed[step.rows] + step.counts)

    def beginners(self) -> np.ndarray:
        """Rows that have no token yet and whose prompt has been read."""
        rows = self.rows
        return np.nonzero(rows.active & (rows.length == 0) & self.prefix_ready[rows.prefix])[0]

    def first_logits(self, beginners: np.ndarray) -> torch.Tensor:
        """[n, V] after the prompts of the beginners."""
        found = []
        for slot in self.rows.prefix[beginners].tolist():
            prefix = self.prefixes[slot]
            assert prefix is not None
            assert prefix.logits is not None
            found.append(prefix.logits)
        for slot in np.unique(self.rows.prefix[beginners]).tolist():
            prefix = self.prefixes[slot]
            if prefix is not None and not self.waiting_of[prefix.request]:
                prefix.logits = None
        return torch.stack(found)

    def finish(self, rows: Iterable[int], stopped: Iterable[bool]) -> list[Finished]:
        """Lets ended sequences go."""
        found = []
        for row, stop in zip(rows, stopped, strict=True):
            slot = int(self.rows.prefix[row])
            prompt_routes = self._prompt_routes(slot)
            progress = self._vacate(row)
            if progress.prompt_routes is not None:
                prompt_routes = progress.prompt_routes
            number = progress.request
            found.append(Finished(number, progress.index, progress.sample("stop" if stop else "length", prompt_routes)))
            prefix = self.prefixes[slot]
            if prefix is not None and prefix.rows == 0 and not self.waiting_of[number]:
                self._drop_prefix(slot)
                self._forget(number)
        return found

    def _prompt_routes(self, slot: int) -> np.ndarray | None:
        prefix = self.prefixes[slot]
        return None if prefix is None else prefix.routes


def _ints(parts: list) -> np.ndarray:
    return np.concatenate([np.asarray(p) for p in parts]).astype(np.int32)
