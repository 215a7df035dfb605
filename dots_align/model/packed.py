"""Batches without padding: sequences one after the other, cut into micro-batches by a token limit."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_PREFIX = -1


@dataclass(frozen=True)
class PackedBatch:
    """S segments without padding.

    `input_ids`, `position_ids` [1, N]; `cu_seq_lens` int32 [S + 1], the segments' boundaries; `prefixes` int64 [S], the
    number of the segment that each one continues, or NO_PREFIX; None where no segment continues another, so that each
    is a sequence.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    prefixes: torch.Tensor | None = None

    def model_inputs(self) -> dict[str, torch.Tensor | bool]:
        shared = {} if self.prefixes is None else {"prefix_segments": self.prefixes}
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seq_lens,
            "use_cache": False,
            **shared,
        }


def pack(sequences: Sequence[list[int]], device: torch.device) -> PackedBatch:
    return _packed(sequences, [0] * len(sequences), device)


def pack_shared(
    prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]], device: torch.device
) -> tuple[PackedBatch, list[list[torch.Tensor]]]:
    """Each prompt once, and behind it all responses that continue it.

    Returns:
        the batch, and the places [prompt + response] of the tokens of each response to each prompt.
    """
    segments: list[list[int]] = []
    prefixes, begins, places, end = [], [], [], 0
    for prompt, continued in zip(prompts, responses, strict=True):
        # A lone response needs no segment of its own, and is cheaper without.
        start, alone = end, len(continued) == 1
        segments += [prompt + continued[0]] if alone else [prompt, *continued]
        prefixes += [NO_PREFIX] if alone else [NO_PREFIX] + [len(prefixes)] * len(continued)
        begins += [0] if alone else [0] + [len(prompt)] * len(continued)
        end += len(prompt)
        of_prompt = torch.arange(start, end, device=device)
        places.append([])
        for response in continued:
            places[-1].append(torch.cat([of_prompt, torch.arange(end, end + len(response), device=device)]))
            end += len(response)
    shared = None if max(prefixes) == NO_PREFIX else torch.tensor(prefixes, device=device)
    return _packed(segments, begins, device, shared), places


def _packed(
    segments: Sequence[list[int]], begins: list[int], device: torch.device, prefixes: torch.Tensor | None = None
) -> PackedBatch:
    """`begins`: the position of each segment's first token in its sequence."""
    lengths = torch.tensor([len(s) for s in segments], device=device)
    ends = lengths.cumsum(0)
    shifts = torch.tensor(begins, device=device) - (ends - lengths)
    position_ids = torch.arange(int(ends[-1]), device=device) + torch.repeat_interleave(shifts, lengths)
    input_ids = torch.tensor([token for segment in segments for token in segment], device=device)
    return PackedBatch(input_ids[None], position_ids[None], torch.cat([ends.new_zeros(1), ends]).int(), prefixes)


def micro_batches(lengths: Sequence[int], max_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Indices in groups of at most `max_tokens` tokens (a longer sequence stands alone) and of nearly equal size: from
    the longest on, each goes where there is least. As few groups as that fills, but `at_least` so many, as far as there
    are indices.
    """
    fewest = max(at_least, -(-sum(lengths) // max_tokens))
    for count in range(min(fewest, len(lengths)), len(lengths) + 1):
        groups = _spread(lengths, max_tokens, count)
        if groups is not None:
            return groups
    return []


def _spread(lengths: Sequence[int], max_tokens: int, count: int) -> list[list[int]] | None:
    """`count` groups, or None where that overfills one."""
    groups: list[list[int]] = [[] for _ in range(count)]
    fills = [(0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not fills:
            return None
        fill, number = fills[0]
        if fill and fill + lengths[index] > max_tokens:
            return None
        groups[number].append(index)
        heapq.heapreplace(fills, (fill + lengths[index], number))
    return groups
