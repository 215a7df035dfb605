"""The engine's attention, plugged into transformers' interface; the module and its weights stay the trainer's own.

transformers hands every attention call the keyword arguments given to the model, so a step object travels to each
layer as `rollout_step` and does that layer's reading and writing of the cache.

Attention to a prefix is computed once for all the tokens that hang on it (to a trunk once for all that hang on its
prefixes), attention to a chain's own tokens chain by chain, and the parts are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from dots_align.rollout.kv_cache import BlockPool
from dots_align.rollout.plan import ForwardPlan

IMPLEMENTATION = "dots_align_rollout"


class RolloutStep(Protocol):
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """query [N, H, D], key and value [N, Hkv, D] of the step's N tokens -> attention output [N, H, D]."""
        ...


def rollout_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    rollout_step: RolloutStep | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value [1, heads, N, D] of N tokens of any sequences -> ([1, N, heads, D], no weights)."""
    assert rollout_step is not None, "the rollout attention runs only inside the rollout engine"
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    output = rollout_step.attend(layer, query, key, value, scaling)
    return output[None], None


AttentionInterface.register(IMPLEMENTATION, rollout_attention)


@contextmanager
def rollout_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switches the model to the engine's attention and to evaluation mode for the duration, then back to what it
    was.
    """
    attention, training = model.config._attn_implementation, model.training
    model.config._attn_implementation = IMPLEMENTATION
    model.eval()
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        model.train(training)


class IdleStep:
    """A forward whose result nobody reads."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        return _repeat_heads(value, query.shape[1])


class CachedStep:
    """The attention of one `ForwardPlan` over the blocks of a pool."""

    def __init__(self, plan: ForwardPlan, pool: BlockPool) -> None:
        self.pool, device = pool, pool.keys[0].device
        counts = np.diff(plan.starts)
        chain = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(plan.num_tokens) - plan.starts[chain] + plan.cached[chain]
        self.blocks = _index(plan.tables[chain, within // pool.block_size], device)
        self.slots = _index(within % pool.block_size, device)
        flash = device.type == "cuda" and pool.keys[0].dtype in (torch.bfloat16, torch.float16)
        part = _FlashPart if flash else _PaddedPart
        self.parts: list[_FlashPart | _PaddedPart] = [
            part(plan.starts, plan.tables, plan.cached + counts, True, device)
        ]
        tables, lengths = plan.prefix_tables, plan.prefix_lengths
        # Flash attention reads pages from where they are, so that a trunk would save little; and a sequence's numbers
        # would depend on whether another one shares it.
        if len(plan.trunk_lengths) and not flash:
            trunks, in_trunks = plan.trunk_starts[:-1], plan.prefix_starts[plan.trunk_starts]
            self.parts.append(part(in_trunks, tables[trunks], plan.trunk_lengths, False, device))
            tables, lengths = _without_trunks(plan, pool.block_size)
        if len(lengths):
            self.parts.append(part(plan.prefix_starts, tables, lengths, False, device))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys[self.blocks, self.slots] = key
        values[self.blocks, self.slots] = value
        own, *others = self.parts
        out, total = own.attend(query, keys, values, scaling)
        for part in others:
            first = part.first
            other, other_total = part.attend(query[first:], keys, values, scaling)
            share = torch.sigmoid(total[first:] - other_total).unsqueeze(-1)  # exp(a) / (exp(a) + exp(b))
            out[first:] = share * out[first:] + (1 - share) * other
            total[first:] = torch.logaddexp(total[first:], other_total)
        return out


def _without_trunks(plan: ForwardPlan, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables [P, B] and lengths [P] of what prefixes have beyond their trunks."""
    trunk = np.zeros(len(plan.prefix_lengths), np.int32)
    trunk[plan.trunk_starts[0] :] = np.repeat(plan.trunk_lengths, np.diff(plan.trunk_starts))
    lengths = plan.prefix_lengths - trunk
    width = max(-(-int(lengths.max()) // block_size), 1)
    at = np.minimum(trunk[:, None] // block_size + np.arange(width), plan.prefix_tables.shape[1] - 1)
    # Behind the last block of a prefix comes its first one, as everywhere.
    at[np.arange(width) * block_size >= lengths[:, None]] = 0
    return np.take_along_axis(plan.prefix_tables, at, 1), lengths


def _index(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(device)


def _repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeats key-value heads (dim 1) for grouped-query models; a no-op for dots1, which has one for each query
    head.
    """
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


class _PaddedPart:
    """Queries of S segments against the cached keys of each: gathered and padded to the longest, for any device.

    Args:
        starts: [S + 1] first query of each segment; consecutive.
        tables: [S, B] blocks. lengths: [S] keys.
        causal: the last query of a segment sees all its keys, each one before it one less; otherwise all see all.
    """

    # Segments of one query (decoding) and of many (prompts) would waste each other's padding.
    def __init__(
        self, starts: np.ndarray, tables: np.ndarray, lengths: np.ndarray, causal: bool, device: torch.device
    ) -> None:
        self.first = int(starts[0])
        firsts, counts = starts[:-1] - self.first, np.diff(starts)
        single = counts == 1
        self.groups = [
            _PaddedGroup(firsts[chosen], counts[chosen], tables[chosen], lengths[chosen], causal, device)
            for chosen in (np.nonzero(single)[0], np.nonzero(~single)[0])
            if len(chosen)
        ]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [N, H, D], keys, values [blocks, block size, Hkv, D] -> output [N, H, D], log-sum-exp [N, H] fp32."""
        if len(self.groups) == 1:
            out, total = self.groups[0].attend(query, keys, values, scaling)
            return out, total
        out, total = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        for group in self.groups:
            out[group.tokens], total[group.tokens] = group.attend(query, keys, values, scaling)
        return out, total


class _PaddedGroup:
    def __init__(
        self,
        firsts: np.ndarray,
        counts: np.ndarray,
        tables: np.ndarray,
        lengths: np.ndarray,
        causal: bool,
        device: torch.device,
    ) -> None:
        segment = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(segment)) - (np.cumsum(counts) - counts)[segment]
        self.tokens = _index(firsts[segment] + place, device)
        self.segment, self.place = _index(segment, device), _index(place, device)
        self.shape = len(counts), int(counts.max())
        self.tables = _index(tables, device)
        self.span = int(lengths.max())
        last = np.broadcast_to(lengths[:, None], self.shape)
        if causal:
            last = np.maximum(lengths[:, None] - counts[:, None] + 1 + np.arange(self.shape[1]), 1)
        # [S, 1, Q, K], True where a key is seen; padding queries see what is there, so that nothing becomes NaN.
        seen = np.arange(self.span) < np.minimum(last, lengths[:, None])[:, :, None]
        self.seen = torch.from_numpy(seen).to(device)[:, None]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        segments, longest = self.shape
        if longest == 1:
            grid = query[self.tokens].unsqueeze(2)
        else:
            grid = query.new_zeros(segments, longest, *query.shape[1:])
            grid[self.segment, self.place] = query[self.tokens]
            grid = grid.transpose(1, 2)
        heads = query.shape[1]
        key, value = (
            _repeat_heads(x[self.tables].flatten(1, 2)[:, : self.span].transpose(1, 2), heads) for x in (keys, values)
        )
        out, total = _attention(grid, key, value, self.seen, scaling)
        if longest == 1:
            return out.squeeze(2), total.squeeze(2)
        return out.transpose(1, 2)[self.segment, self.place], total.transpose(1, 2)[self.segment, self.place]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [S, H, Q, D], key, value [S, H, K, D], seen [S, 1, Q, K] -> output [S, H, Q, D], log-sum-exp [S, H, Q]."""
    scores = ((query * scaling) @ key.transpose(-1, -2)).float().masked_fill_(~seen, float("-inf"))
    total = scores.logsumexp(-1)
    weights = (scores - total.unsqueeze(-1)).exp_().to(value.dtype)
    return weights @ value, total


class _FlashPart:
    """The same by flash attention on pages, on CUDA in half precision: nothing is gathered.

    One split over the keys always, so that a sequence's numbers do not depend on what else is in the batch.
    """

    def __init__(
        self, starts: np.ndarray, tables: np.ndarray, lengths: np.ndarray, causal: bool, device: torch.device
    ) -> None:
        self.first = int(starts[0])
        self.starts, self.tables, self.lengths = (
            torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(device)
            for x in (starts - starts[0], tables, lengths)
        )
        self.most_queries, self.most_keys = int(np.diff(starts).max()), int(lengths.max())
        self.window = (-1, 0) if causal else (-1, -1)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = varlen_attn(
            query.contiguous(),
            keys,
            values,
            self.starts,
            None,
            self.most_queries,
            self.most_keys,
            return_aux=AuxRequest(lse=True),
            scale=scaling,
            window_size=self.window,
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.lengths,
            block_table=self.tables,
            num_splits=1,
        )
        return out, total.transpose(0, 1)  # [H, N] -> [N, H]
