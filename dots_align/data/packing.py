"""Packing conversations into rows of at most `max_length` tokens, in random order; joining several into one.

Packing by falling length (best fit decreasing) fills rows best but puts conversations of one length, so often of one
kind, into one row, and a batch of few rows is then badly mixed. Here each conversation, in shuffled order, goes into
the fullest of a few open rows that has room.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from dots_align.data.chat import EncodedConversation

OPEN_ROWS = 32


def join_sessions(
    encoded: Sequence[EncodedConversation], sessions: int, max_length: int, seed: int
) -> list[EncodedConversation]:
    """Multi-session samples: up to `sessions` conversations, in shuffled order, one behind the other as far as they fit
    into `max_length`.

    Each session is rendered whole, with its own system prompt and labels; as one conversation, a later session reads
    the earlier ones. Invariant: every conversation is in exactly one sample, whole.
    """
    if sessions == 1:
        return list(encoded)
    order = list(range(len(encoded)))
    random.Random(f"sessions-{seed}").shuffle(order)
    samples: list[list[int]] = []
    tokens = max_length + 1  # of the last sample; none is open yet
    for index in order:
        size = len(encoded[index].input_ids)
        if tokens + size > max_length or len(samples[-1]) == sessions:
            samples.append([])
            tokens = 0
        samples[-1].append(index)
        tokens += size
    return [
        EncodedConversation(
            [token for i in members for token in encoded[i].input_ids],
            [label for i in members for label in encoded[i].labels],
        )
        for members in samples
    ]


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
