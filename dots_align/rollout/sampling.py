"""Sampling the next token of many sequences at once, each with its own parameters and counter-based randomness.

The uniform number behind a token is a hash of (request seed, sample index, position): it does not depend on what
else is in the batch or on the order of arrival, so a rollout can be repeated, resumed, or replayed without any
generator state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's output function (Steele et al. 2014) on int64 tensors, wrapping."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def sample_keys(seeds: torch.Tensor, sample_indices: torch.Tensor) -> torch.Tensor:
    """int64 keys [N], one for each sequence, from request seeds [N] and the index of the sample in its group [N]."""
    return _splitmix64(_splitmix64(seeds) ^ sample_indices)


def uniforms(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp64 numbers [N] in [0, 1): the draw of each sequence (`keys` [N]) at its position [N] in the response."""
    return _shift_right(_splitmix64(keys + positions * _GOLDEN), 11).double() / 2**53


@dataclass
class SamplingTable:
    """The sampling parameters of N rows as tensors [N]; `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    keys: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> SamplingTable:
        return SamplingTable(self.temperature[rows], self.top_p[rows], self.top_k[rows], self.keys[rows])


def _filtered(logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """Applies top-k, then top-p (the smallest set that reaches the mass): what falls out becomes -inf. logits [N,
    V].
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)[None]
    limit = torch.where(table.top_k > 0, table.top_k, logits.shape[-1])[:, None]
    ordered = ordered.masked_fill(rank >= limit, float("-inf"))
    probabilities = ordered.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    dropped = (mass_before >= table.top_p[:, None]) & (table.top_p[:, None] < 1)
    ordered = ordered.masked_fill(dropped, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def sample(
    logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws one token for each row.

    Args:
        logits: [N, V], any float dtype; the arithmetic is fp32.
        table: parameters of the N rows.
        positions: [N] index of the token in its response, the counter of the row's randomness.

    Returns:
        tokens [N] int64; their log-probability [N] under the distribution sampled from (0 for greedy rows);
        their log-probability [N] under the model itself (temperature 1, no filter).
    """
    logits = logits.float()
    model_logprobs = logits.log_softmax(-1)
    greedy = table.temperature == 0
    scaled = logits / torch.where(greedy, 1.0, table.temperature)[:, None]
    if bool(((table.top_k > 0) | (table.top_p < 1)).any()):
        scaled = _filtered(scaled, table)
    sampling_logprobs = scaled.log_softmax(-1)
    cdf = sampling_logprobs.exp().cumsum(-1)
    # right=True finds the first entry above the draw, which therefore has mass: a filtered token can never be drawn.
    draw = (uniforms(table.keys, positions)[:, None] * cdf[:, -1:].double()).to(cdf.dtype)
    drawn = torch.searchsorted(cdf, draw, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    # A draw that rounds up to the total itself would fall past the last token with mass.
    last_with_mass = (cdf < cdf[:, -1:]).sum(-1)
    drawn = torch.minimum(drawn, last_with_mass)
    tokens = torch.where(greedy, logits.argmax(-1), drawn)
    pick = tokens[:, None]
    chosen = sampling_logprobs.gather(-1, pick).squeeze(-1)
    return tokens, torch.where(greedy, 0.0, chosen), model_logprobs.gather(-1, pick).squeeze(-1)
