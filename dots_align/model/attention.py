"""Attention for packed sequences on any device, plugged into transformers' attention interface.

Training packs sequences one after the other without padding. Flash attention handles that on recent GPUs only; a
block-diagonal mask works anywhere but costs the square of the whole pack. Here sequences of similar length share one
causal SDPA call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "dots_align_packed"


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
