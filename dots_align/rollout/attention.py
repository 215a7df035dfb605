"""The engine's attention, plugged into transformers' interface; the module and its weights stay the trainer's own.

transformers hands every attention call the keyword arguments given to the model, so a step object travels to each
layer as `rollout_step` and does that layer's reading and writing of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from dots_align.rollout.kv_cache import GroupedKVCache

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
        with torch.no_grad():
            yield
    finally:
        model.config._attn_implementation = attention
        model.train(training)


def _repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeats key-value heads (dim 1) for grouped-query models; a no-op for dots1, which has one for each query
    head.
    """
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


class IdleStep:
    """A forward whose result nobody reads."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        return _repeat_heads(value, query.shape[1])


@dataclass
class PrefillStep:
    """Whole prompts, packed one after the other: token i belongs to prompt `prompt_index[i]` at `positions[i]`.

    Prompts are laid out padded on the right; causality alone keeps real tokens from seeing the padding.
    """

    cache: GroupedKVCache
    slots: torch.Tensor  # [g] group slot of each prompt
    prompt_index: torch.Tensor  # [N]
    positions: torch.Tensor  # [N]
    longest: int

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H, D] -> [g, H, longest, D]"""
        out = x.new_zeros(len(self.slots), self.longest, *x.shape[1:])
        out[self.prompt_index, self.positions] = x
        return out.transpose(1, 2)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        keys, values = self._padded(key), self._padded(value)
        self.cache.prefix_keys[layer][self.slots, :, : self.longest] = keys
        self.cache.prefix_values[layer][self.slots, :, : self.longest] = values
        heads = query.shape[1]
        out = F.scaled_dot_product_attention(
            self._padded(query), _repeat_heads(keys, heads), _repeat_heads(values, heads), is_causal=True, scale=scaling
        )
        return out.transpose(1, 2)[self.prompt_index, self.positions]


@dataclass
class DecodeStep:
    """One new token for each of N running rows; a row's token sits at `suffix_positions` of its own response.

    The prefix part is one matrix product per group (its W queries against the shared prompt); the suffix part is one
    per row. Both sets of scores go through a single softmax.
    """

    cache: GroupedKVCache
    rows: torch.Tensor  # [N]
    suffix_positions: torch.Tensor  # [N]

    def __post_init__(self) -> None:
        cache, width = self.cache, self.cache.group_size
        groups, self.compact = torch.unique(self.rows // width, return_inverse=True)
        # Reading every slot in place beats gathering the busy ones, unless few are busy.
        self.groups = None if 2 * len(groups) > cache.num_groups else groups
        if self.groups is None:
            self.cells, self.grid_groups = self.rows, cache.num_groups
        else:
            self.cells, self.grid_groups = self.compact * width + self.rows % width, len(groups)
        self.dense_rows = 2 * len(self.rows) > cache.num_groups * width
        device = self.rows.device
        lengths = cache.prefix_lengths[self.rows // width]
        self.prefix_span = int(cache.prefix_lengths[groups].max())
        self.suffix_span = int(self.suffix_positions.max()) + 1
        self.prefix_hidden = (torch.arange(self.prefix_span, device=device)[None] >= lengths[:, None])[:, None]
        self.suffix_hidden = (torch.arange(self.suffix_span, device=device)[None] > self.suffix_positions[:, None])[
            :, None
        ]

    def _prefix(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Cached [G, H, P, D] -> the slots of the grid, cut to the longest prompt in use."""
        x = x if self.groups is None else x[self.groups]
        return _repeat_heads(x[:, :, : self.prefix_span], heads)

    def _suffix(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        x = x[:, :, : self.suffix_span]
        return _repeat_heads(x if self.dense_rows else x[self.rows], heads)

    def _to_grid(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H, X] -> [groups, H, W, X]; idle cells are zero."""
        width = self.cache.group_size
        grid = x.new_zeros(self.grid_groups * width, *x.shape[1:])
        grid[self.cells] = x
        return grid.view(self.grid_groups, width, *x.shape[1:]).transpose(1, 2)

    def _from_grid(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1)[self.cells]

    def _to_rows(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dense_rows:
            return x
        out = x.new_zeros(self.cache.num_groups * self.cache.group_size, *x.shape[1:])
        out[self.rows] = x
        return out

    def _from_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.rows] if self.dense_rows else x

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        cache, heads = self.cache, query.shape[1]
        cache.suffix_keys[layer][self.rows, :, self.suffix_positions] = key
        cache.suffix_values[layer][self.rows, :, self.suffix_positions] = value
        query = query * scaling
        prefix_scores = self._from_grid(
            self._to_grid(query) @ self._prefix(cache.prefix_keys[layer], heads).transpose(-1, -2)
        )
        suffix_keys = self._suffix(cache.suffix_keys[layer], heads)
        suffix_scores = self._from_rows((suffix_keys @ self._to_rows(query)[..., None]).squeeze(-1))
        scores = torch.cat(
            [
                prefix_scores.masked_fill(self.prefix_hidden, float("-inf")),
                suffix_scores.masked_fill(self.suffix_hidden, float("-inf")),
            ],
            dim=-1,
        )
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        prefix_weights, suffix_weights = weights.split([self.prefix_span, self.suffix_span], dim=-1)
        prefix_out = self._from_grid(self._to_grid(prefix_weights) @ self._prefix(cache.prefix_values[layer], heads))
        suffix_values = self._suffix(cache.suffix_values[layer], heads)
        suffix_out = self._from_rows((self._to_rows(suffix_weights)[:, :, None] @ suffix_values).squeeze(2))
        return prefix_out + suffix_out
