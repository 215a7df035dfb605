"""Packed rows: everything once, whole, within the limit, and well mixed."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dots_align.data.chat import EncodedConversation
from dots_align.data.packing import join_sessions, pack_conversations

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


def conversations(lengths: list[int]) -> list[EncodedConversation]:
    """Conversation i consists of the token i; its last token carries the label."""
    return [EncodedConversation([i] * n, [-100] * (n - 1) + [i]) for i, n in enumerate(lengths)]


@given(LENGTHS, st.integers(0, 5))
def test_every_conversation_is_in_one_row_whole(lengths: list[int], seed: int) -> None:
    found = []
    for row in pack_conversations(conversations(lengths), 64, seed):
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64
        start = 0
        for size in row["seq_lengths"]:
            (index,) = set(row["input_ids"][start : start + size])
            assert size == lengths[index]
            assert row["labels"][start : start + size] == [-100] * (size - 1) + [index]
            found.append(index)
            start += size
    assert sorted(found) == list(range(len(lengths)))


def test_rows_are_nearly_full_and_their_order_depends_on_the_seed() -> None:
    lengths = [7 + (i * i) % 41 for i in range(600)]
    rows = pack_conversations(conversations(lengths), 256, 0)
    assert sum(lengths) / (256 * len(rows)) > 0.95
    assert rows == pack_conversations(conversations(lengths), 256, 0)
    assert rows != pack_conversations(conversations(lengths), 256, 1)


def test_a_row_holds_conversations_from_everywhere_and_of_every_length() -> None:
    """The first half is short, the second long: in file order, or by falling length, no row would mix them."""
    lengths = [10] * 300 + [30] * 300
    rows = pack_conversations(conversations(lengths), 200, 0)
    mixed = sum(len(set(row["seq_lengths"])) == 2 for row in rows)
    assert mixed / len(rows) > 0.8


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 5))
def test_sessions_are_joined_whole_with_their_labels_and_no_more_than_fit(lengths: list[int], sessions: int) -> None:
    encoded = [EncodedConversation([number] * n, [-100] * (n - 1) + [number]) for number, n in enumerate(lengths)]
    joined = join_sessions(encoded, sessions, 64, 0)
    members = [list(dict.fromkeys(sample.input_ids)) for sample in joined]
    assert sorted(number for sample in members for number in sample) == list(range(len(lengths)))
    for sample, numbers in zip(joined, members, strict=True):
        assert len(numbers) <= sessions
        assert len(sample.input_ids) <= 64
        assert sample.input_ids == [t for n in numbers for t in encoded[n].input_ids]
        assert sample.labels == [t for n in numbers for t in encoded[n].labels]
    for sample, following in itertools.pairwise(members):
        assert len(sample) == sessions or sum(lengths[n] for n in [*sample, following[0]]) > 64


def test_one_session_a_sample_leaves_conversations_alone_and_the_seed_decides_who_meets() -> None:
    encoded = [EncodedConversation([number], [number]) for number in range(20)]
    assert join_sessions(encoded, 1, 64, 0) == encoded
    assert join_sessions(encoded, 3, 64, 0) == join_sessions(encoded, 3, 64, 0) != join_sessions(encoded, 3, 64, 1)


def test_a_later_session_reads_the_earlier_ones_as_one_sequence_of_its_row() -> None:
    encoded = [EncodedConversation([number] * 4, [number] * 4) for number in range(4)]
    rows = pack_conversations(join_sessions(encoded, 2, 64, 0), 64, 0)
    assert [row["seq_lengths"] for row in rows] == [[8, 8]]
