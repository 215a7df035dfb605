"""Batches without padding: sequences one after the other, cut into micro-batches by a token limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedBatch:
    """`input_ids`, `position_ids` [1, N]; `cu_seq_lens` int32 [S + 1], the boundaries of the S sequences."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor

    def model_inputs(self) -> dict[str, torch.Tensor | bool]:
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seq_lens,
            "use_cache": False,
        }


def pack(sequences: Sequence[list[int]], device: torch.device) -> PackedBatch:
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    ends = lengths.cumsum(0)
    position_ids = torch.arange(int(ends[-1]), device=device) - torch.repeat_interleave(ends - lengths, lengths)
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    return PackedBatch(input_ids[None], position_ids[None], torch.cat([ends.new_zeros(1), ends]).int())


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups of at most `max_tokens` tokens (a longer sequence stands alone), in order of falling length."""
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[index] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= lengths[index]
    return groups
