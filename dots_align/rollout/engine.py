"""The rollout engine: many samples of each prompt, with the log-probabilities of what was sampled.

It runs the module it is given, weights and all: inside a trainer there is nothing to copy or to keep in sync, and
what trains is what rolls out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dots_align.model.expert_parallel import compute_dtype, is_sharded
from dots_align.model.router import moe_layers
from dots_align.rollout.forward import Forward, rolling_out
from dots_align.rollout.kv_cache import BlockPool, block_size
from dots_align.rollout.scheduler import Finished, Scheduler, Step
from dots_align.rollout.sync import Certificate, Manifest, WeightReceiver, WeightStream
from dots_align.types import GenerationRequest, Sample, SamplingParams

LOOK_TOKENS = 16
"""After so many tokens each, somebody who knows more than stop tokens may end a sample."""


class RequestErrors(ValueError):
    """Some requests failed; all others are done.

    `errors`: message by request number. `samples`: what `generate` would have returned, with no samples for those.
    """

    def __init__(self, errors: dict[int, str], samples: list[list[Sample]]) -> None:
        super().__init__("\n".join(errors[number] for number in sorted(errors)))
        self.errors, self.samples = errors, samples


@dataclass(frozen=True)
class Failed:
    """A request that cannot be done, and why."""

    request: int
    message: str


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    num_forwards: int = 0
    num_prompt_tokens: int = 0
    """Fed to a forward of several tokens a chain: prompts, and what had to be read again."""
    num_reused_tokens: int = 0
    """At the beginning of prompts, read already for another prompt."""
    num_sampled_tokens: int = 0
    num_preempted: int = 0
    peak_cache_bytes: int = 0
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0


def _anyone(busy: bool) -> bool:
    """Whether any process has work left."""
    flag = torch.tensor(int(busy))  # on the host: every backend we start has gloo for it
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class RolloutEngine:
    """Continuous batching over a dots1 model.

    `generate` is for a list of requests, `stream` gives their samples as they end. Underneath, `submit` puts a request
    in line, `step` makes one forward, `abort` takes a request out as it stands.

    Args:
        model: a `Dots1ForCausalLM`, bare or under adapters, on any device. Of a sharded one every process has its own
            engine, calls `generate` (or `stream`, or `step`) at the same time and may give it other requests, or none.
        max_num_sequences: how many sequences decode at once.
        kv_cache_bytes: the most memory for keys and values in this process. When it runs out, the sequences that came
            last give way and are continued later. By default half of what is free, if that much is needed.
        prefill_chunk_tokens: the most prompt tokens of one forward; they are read beside the decoding of others.
        cache_block_size: tokens in a block of the cache.
        native: use the C++ forward where there is one for this model and machine; it computes the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_num_sequences: int = 256,
        kv_cache_bytes: int | None = None,
        prefill_chunk_tokens: int = 8192,
        cache_block_size: int | None = None,
        native: bool = True,
    ) -> None:
        for name, value in (("max_num_sequences", max_num_sequences), ("prefill_chunk_tokens", prefill_chunk_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.kv_cache_bytes, self.native = kv_cache_bytes, native
        size = cache_block_size or block_size(self.device.type)
        self.num_routing_layers = len(moe_layers(model))
        routes = self.num_routing_layers, int(model.config.num_experts_per_tok)
        self.scheduler = Scheduler(max_num_sequences, size, prefill_chunk_tokens, routes)
        self.stats = EngineStats()
        self._next_request = 0
        self._pool_may_be_small = False  # something got in line since its size was decided
        self._ended: list[Finished] = []
        self._session: Forward | None = None
        self.receiver = WeightReceiver(model)

    # ---------------------------------------------------------------------------------------------- whole batches

    def generate(
        self,
        requests: list[GenerationRequest],
        return_routes: bool = False,
        on_finished: Callable[[int], object] | None = None,
    ) -> list[list[Sample]]:
        """Generates every request's samples.

        Args:
            requests: prompts as token ids, with the number of samples and the sampling parameters of each.
            return_routes: keep the experts each token chose (`Sample.routes`).
            on_finished: called with the number of sequences that just ended, for progress bars.

        Returns:
            For each request, in order, its `num_samples` samples, in order.

        Raises:
            RequestErrors: after all others are done, if a request is impossible (empty prompt, no room in the context
                or in the cache, id outside the vocabulary, nothing to generate) or its numbers became NaN.
        """
        samples: list[dict[int, Sample]] = [{} for _ in requests]
        errors: dict[int, str] = {}
        for event in self.stream(requests, return_routes):
            if isinstance(event, Failed):
                errors[event.request] = event.message
                samples[event.request] = {}
                continue
            samples[event.request][event.index] = event.sample
            if on_finished is not None:
                on_finished(1)
        found = [[by_index[i] for i in sorted(by_index)] for by_index in samples]
        if errors:
            raise RequestErrors(errors, found)
        return found

    def stream(
        self,
        requests: list[GenerationRequest],
        return_routes: bool = False,
        is_whole: Callable[[int, list[int]], bool] | None = None,
    ) -> Iterator[Finished | Failed]:
        """The samples of requests as they end, numbered by their place in the list. If it is not read to its end, what
        has not ended is lost; over several processes all have to read to the end.

        Args:
            is_whole: asked every `LOOK_TOKENS` tokens of a sample, with its request's place and the tokens it has,
                whether it ends here, by `stop`.
        """
        if not requests and not is_sharded(self.model):
            return
        numbers: dict[int, int] = {}
        try:
            with self.session():
                for place, request in enumerate(requests):
                    refusal = self.refusal(request)
                    if refusal is not None:
                        yield Failed(place, f"request {place}: {refusal}")
                        continue
                    numbers[self.submit(request, return_routes)] = place
                while self.anyone_has_work():
                    events = self.step()
                    if is_whole is not None:
                        events += self._end_whole(numbers, is_whole)
                    for event in events:
                        place = numbers[event.request]
                        if isinstance(event, Failed):
                            yield Failed(place, f"request {place}: {event.message}")
                        else:
                            yield Finished(place, event.index, event.sample)
        finally:
            for number in numbers:
                self.abort(number)
            if not self.scheduler.has_work:
                self.sleep()

    # ------------------------------------------------------------------------------------------------ one at a time

    @property
    def has_work(self) -> bool:
        return bool(self._ended) or self.scheduler.has_work

    def anyone_has_work(self, besides: bool = False) -> bool:
        """Whether this process has work (here, or `besides` it), or, if the model is sharded, any of them; collective
        then.
        """
        busy = self.has_work or besides
        return _anyone(busy) if is_sharded(self.model) else busy

    def refusal(self, request: GenerationRequest) -> str | None:
        """Why a request cannot be done, or None."""
        context, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        length, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        if not request.prompt_ids:
            return "the prompt is empty; give at least one token"
        if max_tokens < 1 or request.num_samples < 1:
            return f"max_tokens ({max_tokens}) and num_samples ({request.num_samples}) must be at least 1"
        if trouble := _sampling_trouble(request.sampling):
            return trouble
        if length + max_tokens > context:
            return (
                f"prompt of {length} tokens plus max_tokens {max_tokens} exceeds the context of {context} tokens; "
                "shorten the prompt or lower max_tokens"
            )
        ids = [request.prompt_ids, *(s.response_ids for s in request.started if s.response_ids)]
        if not all(0 <= min(some) <= max(some) < vocabulary for some in ids):
            return f"a token id lies outside the vocabulary (0 to {vocabulary - 1})"
        if len(request.started) > request.num_samples:
            return f"{len(request.started)} samples were started, but num_samples is {request.num_samples}"
        needed = self.scheduler.blocks_needed(request) * self._bytes_per_block()
        if self.kv_cache_bytes is not None and needed > self.kv_cache_bytes:
            return (
                f"prompt and answer need {needed:,} bytes of keys and values, but kv_cache_bytes is "
                f"{self.kv_cache_bytes:,}; raise it, shorten the prompt or lower max_tokens"
            )
        return None

    def submit(self, request: GenerationRequest, return_routes: bool = False) -> int:
        """Puts a request in line; returns its number, by which `step` and `abort` know it.

        Raises:
            ValueError: it cannot be done.
        """
        refusal = self.refusal(request)
        if refusal is not None:
            raise ValueError(refusal)
        number = self._next_request
        self._next_request += 1
        self._pool_may_be_small = True
        self._ended += self.scheduler.add(number, request, return_routes and self.num_routing_layers > 0)
        return number

    def step(self) -> list[Finished | Failed]:
        """One forward: a token for every running sequence and a chunk of the prompts that wait. Returns what ended.

        Of a sharded model all processes make a step together, also those that have no work.
        """
        self.receiver.check()
        with self.session() as forward, torch.no_grad():
            started = time.perf_counter()
            ended: list[Finished | Failed] = [*self._ended]
            self._ended = []
            self._make_pool()
            self.scheduler.admit()
            step = self.scheduler.plan()
            planned = time.perf_counter()
            logits = self._forward(forward, step)
            computed = time.perf_counter()
            ended += self._sample(forward, step, logits)
            self.stats.num_preempted = self.scheduler.num_preempted
            self.stats.num_reused_tokens = self.scheduler.prefix_cache.num_reused
            self.stats.schedule_seconds += planned - started
            self.stats.forward_seconds += computed - planned
            self.stats.sample_seconds += time.perf_counter() - computed
            return ended

    def abort(self, number: int) -> list[Finished]:
        """Takes a request out; its unfinished samples as they stand (`finish_reason` abort). A number that is not, or
        no longer, in work is no error.
        """
        ended = [f for f in self._ended if f.request == number]
        self._ended = [f for f in self._ended if f.request != number]
        if number not in self.scheduler.requests:
            return ended
        return sorted([*ended, *self.scheduler.remove(number)], key=lambda f: f.index)

    def sleep(self) -> None:
        """Frees the cache. Running sequences wait, and are read again by the next `step`."""
        if self.scheduler.pool is not None:
            self.scheduler.put_all_back()
            self.scheduler.pool = None

    def wake(self) -> None:
        """Takes the cache's memory again; the next `step` would do it too."""
        self._make_pool()

    def weights_changed(self) -> None:
        """What is cached was computed with other weights: running sequences are read again with the new ones."""
        self.scheduler.put_all_back()

    def update_weights(self, stream: WeightStream, declared: Manifest) -> Certificate:
        """Writes another process's weights into the model (`rollout.sync`); running sequences go on with them.

        Raises:
            ValueError: the update is not whole or not what was sent; nothing is generated until one is.
        """
        try:
            return self.receiver.update(stream, declared)
        finally:
            self.weights_changed()

    @contextmanager
    def session(self) -> Iterator[Forward]:
        """Keeps the model as the engine needs it over several steps, which then cost less."""
        if self._session is not None:
            yield self._session
            return
        with rolling_out(self.model, self.native) as forward:
            self._session = forward
            try:
                yield forward
            finally:
                self._session = None

    # -------------------------------------------------------------------------------------------------------- parts

    def _forward(self, forward: Forward, step: Step | None) -> torch.Tensor | None:
        if step is None:
            forward.idle()
            return None
        pool = self.scheduler.pool
        assert pool is not None
        want_routes = self.scheduler.rows.routes is not None
        logits, routes = forward(step.plan, pool, want_routes)
        self.scheduler.advance(step, logits, routes)
        self.stats.num_forwards += 1
        self.stats.num_prompt_tokens += step.plan.num_tokens - int((step.counts == 1).sum())
        self.stats.peak_cache_bytes = max(self.stats.peak_cache_bytes, pool.peak_blocks * pool.bytes_per_block)
        return logits

    def _sample(self, forward: Forward, step: Step | None, logits: torch.Tensor | None) -> list[Finished | Failed]:
        """The next token of every sequence whose last one has been read; what ended by it."""
        scheduler, beginners = self.scheduler, self.scheduler.beginners()
        rows, parts = beginners, []
        if step is not None and logits is not None and len(step.ends_rows):
            rows = np.concatenate([step.ends_rows, beginners])
            parts.append(logits[len(step.ends_prompts) :])
        if len(beginners):
            parts.append(scheduler.first_logits(beginners))
        if not parts:
            return []
        table = scheduler.rows.sampling_table(rows, self.device)
        positions = torch.from_numpy(scheduler.rows.length[rows]).to(self.device)
        drawn = forward.sample(parts[0] if len(parts) == 1 else torch.cat(parts), table, positions)
        tokens, rollout_logprobs, logprobs = (x.cpu().numpy() for x in drawn)
        failed = self._fail_broken(forward, rows, logprobs)
        if failed:
            alive = scheduler.rows.active[rows]
            rows, tokens, rollout_logprobs, logprobs = (x[alive] for x in (rows, tokens, rollout_logprobs, logprobs))
        self.stats.num_sampled_tokens += len(rows)
        ended, stopped = scheduler.rows.append(rows, tokens, rollout_logprobs, logprobs)
        return [*failed, *scheduler.finish(ended.tolist(), stopped.tolist())]

    def _end_whole(self, places: dict[int, int], is_whole: Callable[[int, list[int]], bool]) -> list[Finished]:
        """Ends the samples of requests at `places` that are whole."""
        rows = self.scheduler.rows
        whole = []
        for row in np.nonzero(rows.active & (rows.length > 0) & (rows.length % LOOK_TOKENS == 0))[0].tolist():
            place = places.get(int(rows.request[row]))
            if place is not None and is_whole(place, rows.tokens[row, : rows.length[row]].tolist()):
                whole.append(row)
        return self.scheduler.finish(whole, [True] * len(whole))

    def _fail_broken(self, forward: Forward, rows: np.ndarray, logprobs: np.ndarray) -> list[Failed]:
        """Takes out the requests of rows whose logits were NaN or infinite."""
        broken = rows[~np.isfinite(logprobs)]
        failed: dict[int, Failed] = {}
        for row in broken.tolist():
            number = int(self.scheduler.rows.request[row])
            if number in failed:
                continue
            length = int(self.scheduler.rows.length[row])
            tokens = [*self.scheduler.requests[number].prompt_ids, *self.scheduler.rows.tokens[row, :length].tolist()]
            # Over several processes no other would take part in the search.
            where = "" if is_sharded(self.model) else f", first in {forward.first_broken_layer(tokens)}"
            failed[number] = Failed(
                number, f"the logits after {len(tokens)} tokens are NaN or infinite{where}; look at the weights there"
            )
            self.scheduler.remove(number, erase=True)
        return list(failed.values())

    def _bytes_per_block(self) -> int:
        config = self.model.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return numbers * self.scheduler.block_size * compute_dtype(self.model).itemsize

    def _make_pool(self) -> None:
        """A cache as large as what is in line could need, within the budget; grown when more gets in line."""
        scheduler, per_block = self.scheduler, self._bytes_per_block()
        if scheduler.pool is not None and not self._pool_may_be_small:
            return
        self._pool_may_be_small = False
        budget = self.kv_cache_bytes
        if budget is None:
            held = 0 if scheduler.pool is None else scheduler.pool.num_blocks * per_block
            budget = held + _free_memory(self.device) // 2
        wanted = min(scheduler.most_blocks(), budget // per_block)
        if scheduler.pool is not None:
            if wanted > scheduler.pool.num_blocks:
                scheduler.pool.grow(wanted)
            return
        if not scheduler.requests:
            return
        config = self.model.config
        scheduler.pool = BlockPool(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            max(wanted, max(map(scheduler.blocks_needed, scheduler.requests.values()))),
            scheduler.block_size,
            compute_dtype(self.model),
            self.device,
        )


def _sampling_trouble(sampling: SamplingParams) -> str | None:
    """What is wrong with sampling parameters, or None."""
    if not 0 <= sampling.temperature < float("inf"):  # also NaN
        return f"temperature is {sampling.temperature}; give a number of at least 0"
    if not 0 < sampling.top_p <= 1:
        return f"top_p is {sampling.top_p}; give a share above 0, 1 for all tokens"
    if not 0 <= sampling.min_p <= 1:
        return f"min_p is {sampling.min_p}; give a share from 0 to 1"
    if sampling.top_k < 0:
        return f"top_k is {sampling.top_k}; give a count, 0 for all tokens"
    return None


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for whoever asks
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available
