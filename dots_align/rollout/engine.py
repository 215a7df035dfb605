"""The rollout engine: many samples of each prompt, with the log-probabilities of what was sampled.

It runs the module it is given, weights and all: inside a trainer there is nothing to copy or to keep in sync, and
what trains is what rolls out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dots_align.model.expert_parallel import compute_dtype, gathered, is_sharded
from dots_align.model.router import RecordedRoutes, moe_layers, record_routes
from dots_align.rollout.attention import DecodeStep, IdleStep, PrefillStep, RolloutStep, rollout_mode
from dots_align.rollout.kv_cache import GroupedKVCache
from dots_align.rollout.sampling import sample
from dots_align.rollout.scheduler import Admission, Scheduler
from dots_align.types import GenerationRequest, Sample


def _anyone(busy: bool) -> bool:
    """Whether any process has work left."""
    flag = torch.tensor(int(busy))  # on the host: every backend we start has gloo for it
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class _Run:
    """One call of `generate`: its requests, rows and cache; nothing at all where a process has no requests."""

    def __init__(
        self, engine: RolloutEngine, requests: list[GenerationRequest], return_routes: bool, recorded: RecordedRoutes
    ) -> None:
        self.engine, self.recorded = engine, recorded
        self.state = engine._allocate(requests, return_routes) if requests else None

    @property
    def has_work(self) -> bool:
        return self.state is not None and self.state[0].has_work

    def turn(self) -> int:
        """One forward: the prompts of groups that just got a slot, or else a token for every running sequence. Returns
        how many sequences ended.
        """
        assert self.state is not None
        scheduler, cache = self.state
        if admitted := scheduler.admit():
            return self.engine._prefill(scheduler, cache, admitted, self.recorded)
        return self.engine._decode(scheduler, cache, self.recorded)

    def results(self) -> list[list[Sample]]:
        return [] if self.state is None else self.state[0].results()


class RolloutEngine:
    """Continuous batching over a dots1 model.

    Args:
        model: a `Dots1ForCausalLM`, bare or under adapters, on any device. Of a sharded one every process has its own
            engine, calls `generate` at the same time and may give it other requests, or none.
        max_num_sequences: how many sequences decode at once; it bounds the cache.
    """

    def __init__(self, model: PreTrainedModel, max_num_sequences: int = 256) -> None:
        if max_num_sequences < 1:
            raise ValueError(f"max_num_sequences must be at least 1, got {max_num_sequences}")
        self.model, self.max_num_sequences = model, max_num_sequences

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
            ValueError: a prompt is empty, leaves no room in the context, or holds an id outside the vocabulary.
        """
        self._check(requests)
        sharded = is_sharded(self.model)
        if not requests and not sharded:
            return []
        notify = on_finished or (lambda _: None)
        with (
            rollout_mode(self.model),
            gathered(self.model) if sharded else nullcontext(),
            record_routes(self.model) as recorded,
        ):
            run = _Run(self, requests, return_routes, recorded)
            # One forward a turn, so that the processes of a sharded model, which compute each forward together, stay in
            # step; one that has nothing left to do still answers for its experts.
            while _anyone(run.has_work) if sharded else run.has_work:
                if run.has_work:
                    notify(run.turn())
                else:
                    self._idle(recorded)
        return run.results()

    def _check(self, requests: list[GenerationRequest]) -> None:
        context, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        for index, request in enumerate(requests):
            length, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
            if not request.prompt_ids:
                raise ValueError(f"request {index}: the prompt is empty; give at least one token")
            if max_tokens < 1 or request.num_samples < 1:
                raise ValueError(f"request {index}: max_tokens ({max_tokens}) and num_samples must be at least 1")
            if length + max_tokens > context:
                raise ValueError(
                    f"request {index}: prompt of {length} tokens plus max_tokens {max_tokens} exceeds the context of "
                    f"{context} tokens; shorten the prompt or lower max_tokens"
                )
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
                raise ValueError(f"request {index}: a token id lies outside the vocabulary (0 to {vocabulary - 1})")

    def _allocate(self, requests: list[GenerationRequest], return_routes: bool) -> tuple[Scheduler, GroupedKVCache]:
        config, parameter = self.model.config, next(self.model.parameters())
        group_size = min(max(r.num_samples for r in requests), self.max_num_sequences)
        num_blocks = sum(-(-r.num_samples // group_size) for r in requests)
        num_groups = min(max(self.max_num_sequences // group_size, 1), num_blocks)
        suffix_capacity = max(r.sampling.max_tokens for r in requests)
        routes = (len(moe_layers(self.model)), config.num_experts_per_tok) if return_routes else None
        scheduler = Scheduler(requests, num_groups, group_size, suffix_capacity, parameter.device, routes)
        cache = GroupedKVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            num_groups,
            group_size,
            max(len(r.prompt_ids) for r in requests),
            suffix_capacity,
            compute_dtype(self.model),
            parameter.device,
        )
        return scheduler, cache

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, step: RolloutStep, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """tokens and positions [N] of any sequences -> logits [M, V] after the M positions `last`, or after all."""
        # A mask given as a dict is taken as prepared: masking is the step's own business.
        output = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask={"full_attention": None},
            use_cache=False,
            rollout_step=step,
            logits_to_keep=0 if last is None else last,
        )
        return output.logits[0]

    def _idle(self, recorded: RecordedRoutes) -> None:
        """A forward of one token that nobody asked for."""
        token = torch.zeros(1, dtype=torch.long, device=next(self.model.parameters()).device)
        self._forward(token, token, IdleStep())
        recorded.routes.clear()

    def _prefill(
        self, scheduler: Scheduler, cache: GroupedKVCache, admitted: list[Admission], recorded: RecordedRoutes
    ) -> int:
        """Runs the prompts of the admitted groups once each and samples the first token of all their sequences."""
        device = scheduler.device
        prompts = [scheduler.requests[a.request].prompt_ids for a in admitted]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        tokens = torch.tensor([t for p in prompts for t in p], device=device)
        ends = lengths.cumsum(0)
        prompt_index = torch.repeat_interleave(torch.arange(len(prompts), device=device), lengths)
        positions = torch.arange(len(tokens), device=device) - (ends - lengths)[prompt_index]
        slots = torch.tensor([a.slot for a in admitted], device=device)
        cache.prefix_lengths[slots] = lengths
        step = PrefillStep(cache, slots, prompt_index, positions, int(lengths.max()))
        logits = self._forward(tokens, positions, step, ends - 1)
        routes = recorded.take() if moe_layers(self.model) else None
        if scheduler.row_routes is not None and routes is not None:
            for admission, part in zip(admitted, routes.split(lengths.tolist()), strict=True):
                scheduler.prompt_routes[admission.slot] = part
        rows = torch.cat([scheduler.rows_of(a) for a in admitted])
        counts = torch.tensor([a.count for a in admitted], device=device)
        return self._sample(scheduler, rows, logits.repeat_interleave(counts, dim=0))

    def _decode(self, scheduler: Scheduler, cache: GroupedKVCache, recorded: RecordedRoutes) -> int:
        """Feeds every running sequence its last token and samples the next one."""
        rows = scheduler.active_rows()
        at = scheduler.lengths[rows] - 1
        logits = self._forward(
            scheduler.tokens[rows, at], scheduler.prompt_lengths[rows] + at, DecodeStep(cache, rows, at)
        )
        routes = recorded.take() if moe_layers(self.model) else None
        if scheduler.row_routes is not None and routes is not None:
            scheduler.row_routes[rows, at] = routes
        return self._sample(scheduler, rows, logits)

    def _sample(self, scheduler: Scheduler, rows: torch.Tensor, logits: torch.Tensor) -> int:
        """logits [N, V] of the next tokens of `rows`."""
        tokens, rollout_logprobs, logprobs = sample(logits, scheduler.sampling[rows], scheduler.lengths[rows])
        return scheduler.append(rows, tokens, rollout_logprobs, logprobs)
