"""Attention for packed sequences on any device, plugged into transformers' attention interface.

Training packs sequences one after the other without padding. Flash attention handles that on recent GPUs only; a
block-diagonal mask works anywhere but costs the square of the whole pack. Here sequences of similar length share one
causal SDPA call; on CPUs, where a call costs little, each has its own. Sequences that begin with the same tokens may
share them: these are one segment, seen by every segment that continues it.
"""

# once_differentiable hides the names of backward's parameters:
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dots_align.model.packed import NO_PREFIX

IMPLEMENTATION = "dots_align_packed"


# (places of queries, places of the keys that all of them see)
_Block = tuple[slice, slice]


class _OneByOne(torch.autograd.Function):
    """Causal attention of packed segments by torch's CPU kernel, one after the other: nothing is padded or copied.

    What continues a prefix sees it in a second part, one product for all that continue the same one. Two parts of a
    softmax are put together by their sums of exponentials, and given the sums of the whole, the kernel's backward of
    each part is that part of the whole's.

    Computes in fp32 at least: in bf16 the kernel's backward takes up to three times as long on short sequences, and
    loses half of the digits. What is kept for backward has the dtype of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: list[int],
        blocks: list[_Block],
        scaling: float,
    ) -> torch.Tensor:
        q, k, v = (_heads(_wide(x)) for x in (query, key, value))
        parts = [_attend(*inputs, is_causal=True, scale=scaling) for inputs in _segments(lengths, q, k, v)]
        attended, log_sums = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        for rows, prefix in blocks:
            of_prefix, its_sum = _attend(q[:, :, rows], k[:, :, prefix], v[:, :, prefix], scale=scaling)
            log_sum = log_sums[:, :, rows]
            # a e^s + b e^t over e^s + e^t: a moves towards b by t's share, a sigmoid
            attended[:, :, rows].lerp_(of_prefix, torch.sigmoid(its_sum - log_sum).unsqueeze(-1))
            log_sum.copy_(torch.logaddexp(log_sum, its_sum))
        output = _tokens(attended).to(value.dtype).contiguous()  # as what comes next keeps it, so that it is there once
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.plan = lengths, blocks, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, log_sums = ctx.saved_tensors
        lengths, blocks, scaling = ctx.plan
        packed = *(_heads(_wide(x)) for x in (grad, *inputs)), log_sums
        parts = [
            _attend_backward(*part, 0.0, True, scale=scaling) for part in _segments(lengths, *packed)
        ]  # of queries, keys, values
        grads = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
        grad, q, k, v, out, _ = packed
        for rows, prefix in blocks:
            d, query, o, log_sum = (x[:, :, rows] for x in (grad, q, out, log_sums))
            found = _attend_backward(d, query, k[:, :, prefix], v[:, :, prefix], o, log_sum, 0.0, False, scale=scaling)
            for total, places, part in zip(grads, (rows, prefix, prefix), found, strict=True):
                total[:, :, places].add_(part)
        return *(_tokens(g).to(x.dtype) for g, x in zip(grads, inputs, strict=False)), None, None, None


_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _heads(packed: torch.Tensor) -> torch.Tensor:
    """[N, H, D] -> [1, H, N, D], a view."""
    return packed.transpose(0, 1)[None]


def _tokens(heads: torch.Tensor) -> torch.Tensor:
    """The other way."""
    return heads[0].transpose(0, 1)


def _segments(lengths: list[int], *packed: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each segment its part of every tensor [1, H, N, ...], as views."""
    return zip(*(tensor.split(lengths, 2) for tensor in packed), strict=True)


def _blocks(boundaries: list[int], prefixes: list[int]) -> list[_Block]:
    """Who continues which prefix; neighbours that continue the same one are one block."""
    found: list[_Block] = []
    for number, prefix in enumerate(prefixes):
        if prefix == NO_PREFIX:
            continue
        start, seen = boundaries[number], slice(*boundaries[prefix : prefix + 2])
        if found and found[-1][1] == seen and found[-1][0].stop == start:
            start = found.pop()[0].start
        found.append((slice(start, boundaries[number + 1]), seen))
    return found


def packed_causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    prefixes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within each of the packed segments, and from each to the whole of the one it continues.

    Args:
        query, key, value: [N, H, D] of all tokens (as many key-value heads as query heads).
        boundaries: [S + 1] start of each segment, and N at the end (flash attention's `cu_seq_lens`).
        scaling: factor of the scores.
        dropout: probability with which a weight is dropped.
        prefixes: [S] as in `PackedBatch`; a segment that is continued continues none itself.

    Returns:
        [N, H, D]
    """
    if query.device.type == "cpu" and dropout == 0.0:  # the kernel knows no dropout
        blocks = [] if prefixes is None else _blocks(boundaries.tolist(), prefixes.tolist())
        found = _OneByOne.apply(query, key, value, boundaries.diff().tolist(), blocks, scaling)
        assert isinstance(found, torch.Tensor)
        return found
    return _in_buckets(query, key, value, boundaries, scaling, dropout, prefixes)


def _in_buckets(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    prefixes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by one padded SDPA call for each power of two between lengths, and one for each prefix."""
    lengths = boundaries.diff()
    output = torch.empty_like(value)  # autocast may have left the query, normalised, in another dtype
    # Padding to the longest of a bucket wastes less than half of it when lengths in a bucket differ by less than a
    # factor of two.
    buckets = torch.log2(lengths.double()).floor().long()
    if prefixes is not None:
        buckets = torch.where(prefixes == NO_PREFIX, buckets, NO_PREFIX - 1 - prefixes)
    for bucket in buckets.unique().tolist():
        members = (buckets == bucket).nonzero().squeeze(-1)
        sizes, starts = lengths[members], boundaries[members]
        longest = int(sizes.max())
        offsets = torch.arange(longest, device=query.device)
        real = offsets[None] < sizes[:, None]
        # Padding repeats the last token: causality keeps it from everything before it, and its own output is dropped.
        index = starts[:, None] + torch.minimum(offsets[None], sizes[:, None] - 1)
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
        options: Any = {"is_causal": True}
        if bucket < 0:
            first = NO_PREFIX - 1 - bucket
            seen = slice(*boundaries[first : first + 2].tolist())
            k, v = (torch.cat([_heads(x[seen]).expand(len(q), -1, -1, -1), y], 2) for x, y in ((key, k), (value, v)))
            options = {"attn_mask": causal_lower_right(longest, k.shape[2])}
        attended = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout, **options)
        output = output.index_put((index[real],), attended.transpose(1, 2)[real])
    return output


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    dropout: float = 0.0,
    prefix_segments: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: packed where the caller gives `cu_seq_lens_q` (`prefix_segments` are
    `PackedBatch.prefixes`), else plain SDPA.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    boundaries = cu_seq_lens_q.to(q.device).long()
    return packed_causal_attention(q, k, v, boundaries, scaling, dropout, prefix_segments)[None], None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Packed batches come without a mask and need none; padded ones get SDPA's."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
