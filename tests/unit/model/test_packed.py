"""Packing without padding, and micro-batches by a token limit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dots_align.model.packed import micro_batches, pack, pack_shared


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 400))
def test_micro_batches_hold_every_index_once_and_respect_the_limit(lengths: list[int], limit: int) -> None:
    groups = micro_batches(lengths, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= limit


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 400), st.integers(1, 50))
def test_micro_batches_are_of_nearly_equal_size(lengths: list[int], limit: int, at_least: int) -> None:
    groups = micro_batches(lengths, limit, at_least)
    assert len(groups) >= min(at_least, len(lengths))
    sizes = [sum_of(lengths, group) for group in groups]
    # Whatever a group has more than another is less than the last that came to it.
    assert all(
        max(sizes) - lengths[group[-1]] <= min(sizes) for group in groups if sum_of(lengths, group) == max(sizes)
    )


def sum_of(lengths: list[int], group: list[int]) -> int:
    return sum(lengths[i] for i in group)


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


WORDS = st.lists(st.integers(0, 9), min_size=1, max_size=7)


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=4)), min_size=1, max_size=5))
def test_shared_prompts_are_there_once_and_keep_positions(groups: list[tuple[list[int], list[list[int]]]]) -> None:
    prompts, responses = ([g[0] for g in groups], [g[1] for g in groups])
    batch, places = pack_shared(prompts, responses, torch.device("cpu"))
    assert batch.input_ids.shape[1] == sum(len(p) + sum(map(len, r)) for p, r in groups)
    seen = set()
    for (prompt, answers), of_prompt in zip(groups, places, strict=True):
        assert len({tuple(row[: len(prompt)].tolist()) for row in of_prompt}) == 1
        for answer, row in zip(answers, of_prompt, strict=True):
            assert batch.input_ids[0, row].tolist() == prompt + answer
            assert batch.position_ids[0, row].tolist() == list(range(len(row)))
            seen |= set(row.tolist())
    assert seen == set(range(batch.input_ids.shape[1]))
