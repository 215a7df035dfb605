"""The engines that run in this process: transformers, the training forward, the rollout engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dots_align.data.chat import as_dicts, stop_token_ids
from dots_align.model.attention import IMPLEMENTATION as PACKED
from dots_align.model.experts import IMPLEMENTATION as GROUPED
from dots_align.model.packed import pack
from dots_align.model.router import record_routes
from dots_align.parity.observation import Asked, Observation, Question
from dots_align.rollout.engine import RolloutEngine
from dots_align.rollout.forward import Forward, rolling_out
from dots_align.rollout.kv_cache import BlockPool
from dots_align.rollout.native.forward import why_not
from dots_align.rollout.plan import ForwardPlan
from dots_align.types import GenerationRequest, SamplingParams

# Far above any logit, and still exact in fp32 beside one.
CERTAIN = 1e4


class Transformers:
    """transformers' own forward, one prompt at a time, and its `generate`."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, attention: str = "eager", experts: str = "eager"
    ) -> None:
        self.model, self.tokenizer, self.implementations = model, tokenizer, (attention, experts)
        self.name = f"transformers {attention}"

    @torch.no_grad()
    def observe(self, asked: Asked) -> Observation:
        logits = []
        with _implementations(self.model, *self.implementations), record_routes(self.model) as recorded:
            for question in asked.questions:
                ids = torch.tensor([question.token_ids], device=self.model.device)
                logits.append(self.model(input_ids=ids, use_cache=False).logits[0].float().cpu())
            routes = [routes.cpu() for routes in recorded.routes]
            stopped = self._stops(asked)
        rendered = [_rendered(self.tokenizer, question) for question in asked.questions]
        stops = self.model.generation_config.eos_token_id
        stop_ids = frozenset(stops if isinstance(stops, list) else [stops])
        return Observation(logits, routes=routes, rendered=rendered, stop_ids=stop_ids, stopped=stopped)

    def _stops(self, asked: Asked) -> bool:
        """Whether `generate` ends where the end of the turn is certain."""
        ids = torch.tensor([asked.questions[0].token_ids], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=3,
            sequence_bias=[[[asked.end_of_turn], CERTAIN]],
        )
        return output[0, ids.shape[1] :].tolist() == [asked.end_of_turn]


class Training:
    """The forward that trains: all prompts packed into one row, packed attention, grouped experts."""

    name = "training"

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def observe(self, asked: Asked) -> Observation:
        sequences = [list(question.token_ids) for question in asked.questions]
        with _implementations(self.model, PACKED, GROUPED), record_routes(self.model) as recorded:
            batch = pack(sequences, self.model.device)
            logits = self.model(**batch.model_inputs()).logits[0].float().cpu()
            routes = recorded.take().cpu()
        lengths = [len(sequence) for sequence in sequences]
        return Observation(list(logits.split(lengths)), routes=list(routes.split(lengths)))


class Rollout:
    """The rollout engine's forward: the first half of a prompt read at once, the rest token by token beside the others,
    as answers to it are; and its `generate`.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, native: bool) -> None:
        self.model, self.tokenizer, self.native = model, tokenizer, native
        self.name = "rollout native" if native else "rollout torch"

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        return why_not(self.model) if self.native else None

    @torch.no_grad()
    def observe(self, asked: Asked) -> Observation:
        with rolling_out(self.model, self.native) as forward:
            logits, routes = _teacher_forced(self.model, forward, [list(q.token_ids) for q in asked.questions])
        stops = stop_token_ids(self.tokenizer)
        return Observation(logits, routes=routes, stop_ids=frozenset(stops), stopped=self._stops(asked, stops))

    def _stops(self, asked: Asked, stops: tuple[int, ...]) -> bool:
        """As `Transformers._stops`; the engine takes no bias, so the head is changed for the time of it."""
        sampling = SamplingParams(temperature=0.0, max_tokens=3, stop_token_ids=stops)
        request = GenerationRequest(list(asked.questions[0].token_ids), 1, sampling)

        def first() -> Any:
            return RolloutEngine(self.model, native=self.native).generate([request])[0][0]

        said = first().response_ids[0]
        if said == asked.end_of_turn:
            return first().finish_reason == "stop"
        with _exchanged(self.model.lm_head.weight, said, asked.end_of_turn):
            sample = first()
        return sample.response_ids == [asked.end_of_turn] and sample.finish_reason == "stop"


def _rendered(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int] | None:
    if question.messages:
        turns = as_dicts(question.messages)
        encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])
    if question.text is None:
        return None
    ids: Any = tokenizer(question.text)["input_ids"]
    return list(ids)


@contextmanager
def _implementations(model: Any, attention: str, experts: str) -> Iterator[None]:
    """The model in evaluation mode with other implementations; afterwards as it was."""
    config, training = model.config, model.training
    before = config._attn_implementation, config._experts_implementation
    config._attn_implementation, config._experts_implementation = attention, experts
    model.eval()
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = before
        model.train(training)


@contextmanager
def _exchanged(matrix: torch.Tensor, a: int, b: int) -> Iterator[None]:
    """Two rows of a matrix in each other's place."""
    matrix.data[[a, b]] = matrix.data[[b, a]]
    try:
        yield
    finally:
        matrix.data[[a, b]] = matrix.data[[b, a]]


# ------------------------------------------------------------------------------------- given tokens through the engine


def _teacher_forced(
    model: Any, forward: Forward, sequences: Sequence[list[int]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits [T, V] and routes [T, layers, k] of each sequence."""
    config, device = model.config, model.device
    size = 16 if device.type == "cpu" else 256
    split = [max(1, len(sequence) // 2) for sequence in sequences]
    blocks = sum(-(-a // size) + -(-(len(s) - a) // size) for a, s in zip(split, sequences, strict=True))
    pool = BlockPool(
        config.num_hidden_layers, config.num_key_value_heads, config.head_dim, blocks, size, model.dtype, device
    )
    chains = [
        _Chain(s[:a], s[a:], pool.take(-(-a // size)), pool.take(-(-(len(s) - a) // size)))
        for s, a in zip(sequences, split, strict=True)
    ]
    for chain in chains:
        chain.keep(*forward(_reading(chain), pool, True))
    for step in range(max(len(chain.rest) for chain in chains)):
        running = [chain for chain in chains if step < len(chain.rest)]
        logits, routes = forward(_decoding(running, step), pool, True)
        for row, chain in enumerate(running):
            chain.keep(logits[row : row + 1], None if routes is None else routes[row : row + 1])
    return [torch.cat(c.logits) for c in chains], [torch.from_numpy(np.concatenate(c.routes)) for c in chains]


class _Chain:
    """A sequence in the cache: the part read at once, the rest, and the blocks of both."""

    def __init__(self, prompt: list[int], rest: list[int], blocks: np.ndarray, own: np.ndarray) -> None:
        self.prompt, self.rest, self.blocks, self.own = prompt, rest, blocks, own
        self.logits: list[torch.Tensor] = []
        self.routes: list[np.ndarray] = []

    def keep(self, logits: torch.Tensor, routes: np.ndarray | None) -> None:
        assert routes is not None
        self.logits.append(logits.float().cpu())
        self.routes.append(routes.copy())


def _ints(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, np.int32)


def _tables(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """[C, B]; a shorter row repeats its first block."""
    width = max(map(len, blocks))
    return _ints([[*row, *[row[0]] * (width - len(row))] for row in blocks])


def _reading(chain: _Chain) -> ForwardPlan:
    count = len(chain.prompt)
    return ForwardPlan(
        tokens=_ints(chain.prompt),
        positions=_ints(range(count)),
        starts=_ints([0, count]),
        cached=_ints([0]),
        tables=_tables([chain.blocks]),
        prefix_starts=_ints([count]),
        prefix_tables=np.empty((0, 1), np.int32),
        prefix_lengths=_ints([]),
        logits_at=_ints(range(count)),
    )


def _decoding(chains: Sequence[_Chain], step: int) -> ForwardPlan:
    count = len(chains)
    return ForwardPlan(
        tokens=_ints([chain.rest[step] for chain in chains]),
        positions=_ints([len(chain.prompt) + step for chain in chains]),
        starts=_ints(range(count + 1)),
        cached=_ints([step] * count),
        tables=_tables([chain.own for chain in chains]),
        prefix_starts=_ints(range(count + 1)),
        prefix_tables=_tables([chain.blocks for chain in chains]),
        prefix_lengths=_ints([len(chain.prompt) for chain in chains]),
        logits_at=_ints(range(count)),
    )
