"""What one forward of the engine computes: which tokens, and which cached keys each of them may see.

A *chain* is a run of tokens with cached keys and values of its own: a prompt, or one sampled response. A response's
chain hangs on its prompt's (the *prefix*), which all responses to the prompt share. A forward advances some chains by
some tokens each: a prompt by a chunk of itself, a running response by the one token sampled last, a response that lost
its cache by all it had said.

Prefixes that begin in the same blocks (what the prompts of an evaluation have in common) have a *trunk*: that much of
them is the same to all tokens that hang on any of them, and can be attended to for all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Ints = np.ndarray  # int32

MIN_TRUNK = 64
"""Tokens below which it does not pay to attend to what prefixes have in common by itself."""


@dataclass(frozen=True)
class ForwardPlan:
    """N tokens of C chains, chain after chain; chains with the same prefix are neighbours.

    Token i of chain c is number `cached[c] + i - starts[c]` of that chain. It sees the whole prefix of its chain and,
    of the chain itself, every token up to itself. Its own keys and values are written before anyone reads them.

    All arrays are int32, C-contiguous.
    """

    tokens: Ints  # [N] ids
    positions: Ints  # [N] in the sequence, prefix included: what the rotary embedding sees
    starts: Ints  # [C + 1] first token of each chain in `tokens`, and N
    cached: Ints  # [C] tokens of the chain that the cache holds already
    tables: Ints  # [C, B] blocks of each chain in order; entries past its last block repeat its first
    prefix_starts: (
        Ints  # [P + 1] first token in `tokens` of the chains of each prefix; chains before prefix_starts[0] have none
    )
    prefix_tables: Ints  # [P, B'] blocks of each prefix
    prefix_lengths: Ints  # [P] tokens in each prefix
    logits_at: Ints  # [M] indices into `tokens` after which logits are wanted, ascending
    trunk_starts: Ints = field(default_factory=lambda: np.zeros(1, np.int32))
    # [T + 1] first prefix of each trunk, and P; prefixes before trunk_starts[0] are in none, of T = 0 it means nothing
    trunk_lengths: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    # [T] tokens at the beginning of a trunk's prefixes, whole blocks, which are the same ones in their tables

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def find_trunks(tables: Ints, lengths: Ints, block_size: int) -> tuple[Ints, Ints, Ints]:
    """An order of prefixes in which those with a trunk are neighbours, at the end, and their trunks.

    Args:
        tables: [P, B] blocks of each prefix. lengths: [P] its tokens.

    Returns:
        order [P]; `trunk_starts` and `trunk_lengths` of a plan with the prefixes in that order.
    """
    count = len(lengths)
    if len(np.unique(tables[:, 0])) == count:
        return np.arange(count), np.array([count], np.int32), np.zeros(0, np.int32)
    names = [row.tobytes() for row in tables]
    order = np.array(sorted(range(count), key=names.__getitem__))
    # Never all of a prefix: what is left to be seen by itself is not empty.
    alike = _alike(tables[order], (lengths[order] - 1) // block_size) * block_size
    alone, groups, trunk_lengths = [], [], []
    first = 0
    while first < count:
        last, trunk = first, 0
        for longer in alike[first:].tolist():
            if longer < MIN_TRUNK or (trunk and not trunk <= 2 * longer <= 4 * trunk):
                break
            trunk, last = min(trunk, longer) if trunk else longer, last + 1
        members = order[first : last + 1]
        if trunk:
            groups.append(members)
            trunk_lengths.append(trunk)
        else:
            alone.append(members)
        first = last + 1
    starts = count - np.cumsum([0, *map(len, groups[::-1])])[::-1]
    return np.concatenate([*alone, *groups]), starts.astype(np.int32), np.array(trunk_lengths, np.int32)


def _alike(tables: Ints, whole: np.ndarray) -> np.ndarray:
    """[P - 1] blocks with which each of tables [P, B] and the next one begin alike, among their first `whole` [P]."""
    same = tables[1:] == tables[:-1]
    count = np.where(same.all(1), tables.shape[1], same.argmin(1))
    return np.minimum(count, np.minimum(whole[1:], whole[:-1]))
