"""Finds blocks of the cache in which the beginning of a prompt has been read already, for another prompt.

Prompts of an evaluation begin alike (the same examples, the same system message): what they share is read once, and
held once from then on. Only whole blocks are shared, and a block says what it says only after those before it, so it is
known by the block it follows and its own tokens. It is forgotten when nobody holds it any more.
"""

from __future__ import annotations

import numpy as np

Key = tuple[int, bytes]
"""The block before (-1: none), and the tokens."""


class PrefixCache:
    """What the blocks of prompts that are in the cache hold."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._block: dict[Key, int] = {}
        self._key: dict[int, Key] = {}
        self._routes: dict[int, np.ndarray] = {}
        self.num_reused = 0
        """Prompt tokens that did not have to be read."""

    def find(self, tokens: np.ndarray, with_routes: bool) -> list[int]:
        """The blocks that hold the beginning of a prompt [n]; never its last token, whose logits are wanted.

        Args:
            with_routes: only blocks whose routes are known.
        """
        found: list[int] = []
        for at in range(0, len(tokens) - self.block_size, self.block_size):
            block = self._block.get(self._key_of(tokens, at, found))
            if block is None or (with_routes and block not in self._routes):
                break
            found.append(block)
        return found

    def routes(self, blocks: list[int]) -> np.ndarray:
        """[len(blocks) * block_size, layers, k] of the tokens in them."""
        return np.concatenate([self._routes[block] for block in blocks])

    def next_key(self, tokens: np.ndarray, blocks: np.ndarray, num_computed: int) -> Key | None:
        """How the block that follows `num_computed` tokens of a prompt would be known; None if it is not a whole one,
        or the prompt's last.
        """
        at = num_computed // self.block_size * self.block_size
        if at + self.block_size >= len(tokens):
            return None
        return self._key_of(tokens, at, blocks[: at // self.block_size])

    def add(self, tokens: np.ndarray, blocks: np.ndarray, start: int, stop: int, routes: np.ndarray | None) -> None:
        """Takes note that tokens [start, stop) of a prompt have been read, those before them already."""
        for number in range(start // self.block_size, stop // self.block_size):
            at = number * self.block_size
            key, block = self._key_of(tokens, at, blocks[:number]), int(blocks[number])
            if key in self._block or block in self._key:
                continue
            self._block[key], self._key[block] = block, key
            if routes is not None:
                self._routes[block] = routes[at : at + self.block_size].copy()

    def forget(self, blocks: np.ndarray) -> None:
        """Blocks that are about to hold something else."""
        for block in blocks.tolist():
            if (key := self._key.pop(block, None)) is not None:
                del self._block[key]
                self._routes.pop(block, None)

    def _key_of(self, tokens: np.ndarray, at: int, before: list[int] | np.ndarray) -> Key:
        return int(before[-1]) if len(before) else -1, tokens[at : at + self.block_size].tobytes()
