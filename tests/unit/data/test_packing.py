"""Packed rows: everything once, whole, within the limit, and well mixed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dots_align.data.chat import EncodedConversation
from dots_align.data.packing import pack_conversations

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
