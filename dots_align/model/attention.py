"""Attention for packed sequences on any device, plugged into transformers' attention interface.

Training packs sequences one after the other without padding. Flash attention handles that on recent GPUs only; a
block-diagonal mask works anywhere but costs the square of the whole pack. Here sequences of similar length share one
causal SDPA call; on CPUs, where a call costs little, each has its own.
"""

# once_differentiable hides the names of backward's parameters:
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "dots_align_packed"


class _OneByOne(torch.autograd.Function):
    """Causal attention of packed sequences by torch's CPU kernel, one after the other: nothing is padded or copied.

    Computes in fp32 at least: in bf16 the kernel's backward takes up to three times as long on short sequences, and
    loses half of the digits. What is kept for backward has the dtype of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float
    ) -> torch.Tensor:
        output, log_sums = torch.empty_like(value), []
        for out, *inputs in _sequences(lengths, output, *map(_wide, (query, key, value))):
            attended, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, is_causal=True, scale=scaling
            )
            out.copy_(attended)
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, output, *log_sums)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, *log_sums = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        inputs = map(_wide, (grad, query, key, value, output))
        sequences = _sequences(ctx.lengths, *grads, *inputs)
        for (*results, grad_of_one, q, k, v, out), log_sum in zip(sequences, log_sums, strict=True):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_of_one, q, k, v, out, log_sum, 0.0, True, scale=ctx.scaling
            )
            for result, part in zip(results, found, strict=True):
                result.copy_(part)
        return *grads, None, None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sequences(lengths: list[int], *packed: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each sequence its part of every tensor [N, H, D], as a view [1, H, length, D]."""
    parts = ([part.transpose(0, 1)[None] for part in tensor.split(lengths)] for tensor in packed)
    return zip(*parts, strict=True)


def packed_causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention within each of the packed sequences.

    Args:
        query, key, value: [N, H, D] of all tokens (as many key-value heads as query heads).
        boundaries: [S + 1] start of each sequence, and N at the end (flash attention's `cu_seq_lens`).
        scaling: factor of the scores.
        dropout: probability with which a weight is dropped.

    Returns:
        [N, H, D]
    """
    if query.device.type == "cpu" and dropout == 0.0:  # the kernel knows no dropout
        return _OneByOne.apply(query, key, value, boundaries.diff().tolist(), scaling)  # pyright: ignore[reportReturnType]
    return _in_buckets(query, key, value, boundaries, scaling, dropout)


def _in_buckets(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The same by one padded SDPA call for each power of two between lengths."""
    lengths = boundaries.diff()
    output = torch.empty_like(value)  # autocast may have left the query, normalised, in another dtype
    # Padding to the longest of a bucket wastes less than half of it when lengths in a bucket differ by less than a
    # factor of two.
    buckets = torch.log2(lengths.double()).floor().long()
    for bucket in buckets.unique().tolist():
        members = (buckets == bucket).nonzero().squeeze(-1)
        sizes, starts = lengths[members], boundaries[members]
        longest = int(sizes.max())
        offsets = torch.arange(longest, device=query.device)
        real = offsets[None] < sizes[:, None]
        # Padding repeats the last token: causality keeps it from everything before it, and its own output is dropped.
        index = starts[:, None] + torch.minimum(offsets[None], sizes[:, None] - 1)
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout).transpose(
            1, 2
        )
        output = output.index_put((index[real],), attended[real])
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: packed where the caller gives `cu_seq_lens_q`, else plain SDPA."""
    if cu_seq_lens_q is None or query.shape[0] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return packed_causal_attention(q, k, v, cu_seq_lens_q.to(q.device).long(), scaling, dropout)[None], None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Packed batches come without a mask and need none; padded ones get SDPA's."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
