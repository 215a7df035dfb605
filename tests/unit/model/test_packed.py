"""Packing without padding, and micro-batches by a token limit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dots_align.model.packed import micro_batches, pack


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 400))
def test_micro_batches_hold_every_index_once_and_respect_the_limit(lengths: list[int], limit: int) -> None:
    groups = micro_batches(lengths, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= limit


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_a_generous_limit_gives_one_micro_batch(lengths: list[int]) -> None:
    assert len(micro_batches(lengths, sum(lengths))) == 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=6))
def test_packing_keeps_tokens_and_counts_positions_anew(sequences: list[list[int]]) -> None:
    batch = pack(sequences, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[t for s in sequences for t in s]]
    assert batch.position_ids.tolist() == [[p for s in sequences for p in range(len(s))]]
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.cu_seq_lens.diff().tolist() == [len(s) for s in sequences]
    assert int(batch.cu_seq_lens[0]) == 0
