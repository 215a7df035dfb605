"""What one forward of the engine computes: which tokens, and which cached keys each of them may see.

A *chain* is a run of tokens with cached keys and values of its own: a prompt, or one sampled response. A response's
chain hangs on its prompt's (the *prefix*), which all responses to the prompt share. A forward advances some chains by
some tokens each: a prompt by a chunk of itself, a running response by the one token sampled last, a response that lost
its cache by all it had said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Ints = np.ndarray  # int32


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

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)
