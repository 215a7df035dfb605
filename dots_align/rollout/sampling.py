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
    """The sampling parameters of N rows as tensors [N]: fp32 `temperature` (0 is greedy), `top_p`, `min_p`, int64
    `top_k` and `keys`. `filtered`: whether any row uses a filter; `tempered`: whether any has a temperature not 1.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    keys: torch.Tensor
    filtered: bool = True
    tempered: bool = True

    def __getitem__(self, rows: torch.Tensor) -> SamplingTable:
        columns = self.temperature, self.top_p, self.top_k, self.min_p, self.keys
        return SamplingTable(*[column[rows] for column in columns], filtered=self.filtered, tempered=self.tempered)


def _filtered(logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """Applies top-k, top-p (the smallest set that reaches the mass), then min-p: what falls out becomes -inf.

    logits [N, V], tempered.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)[None]
    limit = torch.where(table.top_k > 0, table.top_k, logits.shape[-1])[:, None]
    ordered = ordered.masked_fill(rank >= limit, float("-inf"))
    probabilities = ordered.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    dropped = (mass_before >= table.top_p[:, None]) & (table.top_p[:, None] < 1)
    ordered = ordered.masked_fill(dropped, float("-inf"))
    # The share of the likeliest token's probability is a difference of logits, whatever has been dropped.
    unlikely = ordered < ordered[:, :1] + table.min_p[:, None].log()
    ordered = ordered.masked_fill(unlikely, float("-inf"))
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
        their log-probability [N] under the model itself (temperature 1, no filter). Of a row with NaN among its logits
        the log-probabilities are NaN and the token means nothing.
    """
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    greedy = table.temperature == 0
    scaled, scaled_total = logits, total
    if table.tempered:
        scaled = logits / torch.where(greedy, 1.0, table.temperature)[:, None]
    if table.filtered:
        scaled = _filtered(scaled, table)
    if table.tempered or table.filtered:
        scaled_total = scaled.logsumexp(-1, keepdim=True)
    cdf = (scaled - scaled_total).exp_().cumsum(-1)
    # right=True finds the first entry above the draw, which therefore has mass: a filtered token can never be drawn.
    draw = (uniforms(table.keys, positions)[:, None] * cdf[:, -1:].double()).to(cdf.dtype)
    drawn = torch.searchsorted(cdf, draw, right=True)
    # A draw that rounds up to the total itself would fall past the last token with mass.
    drawn = torch.minimum(drawn, (cdf < cdf[:, -1:]).sum(-1, keepdim=True))
    tokens = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), drawn)
    logprobs = (logits.gather(-1, tokens) - total).squeeze(-1)
    chosen = (scaled.gather(-1, tokens) - scaled_total).squeeze(-1)
    # 0 * NaN keeps a broken row's log-probability NaN.
    return tokens.squeeze(-1), torch.where(greedy, 0.0 * logprobs, chosen), logprobs
