"""Packing conversations into rows of at most `max_length` tokens, in random order.

Packing by falling length (best fit decreasing) fills rows best but puts conversations of one length, so often of one
kind, into one row, and a batch of few rows is then badly mixed. Here each conversation, in shuffled order, goes into
the fullest of a few open rows that has room.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from dots_align.data.chat import EncodedConversation

OPEN_ROWS = 32


def pack_conversations(
    encoded: Sequence[EncodedConversation], max_length: int, seed: int
) -> list[dict[str, list[int]]]:
    """Rows `{input_ids, labels, seq_lengths}` (TRL's names); `seq_lengths` are those of the conversations in a row.

    Invariant: every conversation is in exactly one row, whole; no row is longer than `max_length`.
    """
    order = list(range(len(encoded)))
    random.Random(f"packing-{seed}").shuffle(order)
    done: list[list[int]] = []
    rows: list[tuple[int, list[int]]] = []  # (tokens, members) of the rows still open
    for index in order:
        size = len(encoded[index].input_ids)
        assert size <= max_length, "encode_conversations cuts at max_length"
        fits = [number for number, (tokens, _) in enumerate(rows) if tokens + size <= max_length]
        if fits:
            fullest = max(fits, key=lambda number: rows[number][0])
            tokens, members = rows[fullest]
            rows[fullest] = (tokens + size, [*members, index])
            continue
        if len(rows) == OPEN_ROWS:
            done.append(rows.pop(max(range(OPEN_ROWS), key=lambda number: rows[number][0]))[1])
        rows.append((size, [index]))
    done += [members for _, members in rows]
    return [
        {
            "input_ids": [token for i in members for token in encoded[i].input_ids],
            "labels": [label for i in members for label in encoded[i].labels],
            "seq_lengths": [len(encoded[i].input_ids) for i in members],
        }
        for members in done
    ]
