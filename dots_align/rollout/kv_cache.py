"""Keys and values in blocks of a fixed number of tokens, and who holds which block."""

from __future__ import annotations

import numpy as np
import torch


def block_size(device_type: str) -> int:
    """Tokens in a block of the cache. Flash attention on CUDA wants multiples of 256; small blocks waste less."""
    return 256 if device_type == "cuda" else 16


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU their memory is only taken when first written (calloc), so an unused block costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = {2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, bits)).view(dtype)


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, each through all layers: `keys[layer]` and `values[layer]` are
    [num_blocks, block_size, H, D]. Which tokens a block holds is known to whoever took it.

    Blocks start as zeros and are handed out as they were left: what lies behind a chain's last token has to be
    finite (it is multiplied by zero) but means nothing.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        shape = (num_blocks, block_size, num_heads, head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack: the last entry goes first
        self._num_free, self._in_order = num_blocks, True
        self._holders = np.zeros(num_blocks, np.int32)
        self.peak_blocks = 0

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def bytes_per_block(self) -> int:
        return 2 * sum(layer[0].numel() * layer.element_size() for layer in self.keys)

    def take(self, count: int) -> np.ndarray:
        """[count] int32 ids of blocks nobody holds. The caller has made sure that there are as many.

        The lowest ones: memory that has been used before costs less than memory that has not.
        """
        assert count <= self._num_free, f"{count} blocks asked of {self._num_free}"
        if not self._in_order:
            self._free[: self._num_free] = np.sort(self._free[: self._num_free])[::-1]
            self._in_order = True
        self._num_free -= count
        self.peak_blocks = max(self.peak_blocks, self.num_blocks - self._num_free)
        taken = self._free[self._num_free : self._num_free + count].copy()
        self._holders[taken] = 1
        return taken

    def share(self, blocks: np.ndarray) -> None:
        """One more holder for blocks that are held."""
        assert (self._holders[blocks] > 0).all()
        self._holders[blocks] += 1

    def give_back(self, blocks: np.ndarray) -> np.ndarray:
        """One holder less for each; returns those that nobody holds any more."""
        self._holders[blocks] -= 1
        free = blocks[self._holders[blocks] == 0]
        self._free[self._num_free : self._num_free + len(free)] = free
        self._num_free += len(free)
        self._in_order = False
        return free

    def grow(self, num_blocks: int) -> None:
        """More blocks; those there keep their ids and content. One layer's copy at a time."""
        for layers in (self.keys, self.values):
            for index, old in enumerate(layers):
                layers[index] = _zeros((num_blocks, *old.shape[1:]), old.dtype, old.device)
                layers[index][: self.num_blocks] = old
        new = np.arange(num_blocks - 1, self.num_blocks - 1, -1, dtype=np.int32)
        free = np.concatenate([new, self._free[: self._num_free]])
        self._free = np.zeros(num_blocks, np.int32)
        self._free[: len(free)] = free
        self._holders = np.concatenate([self._holders, np.zeros(num_blocks - self.num_blocks, np.int32)])
        self._num_free, self.num_blocks, self._in_order = len(free), num_blocks, False

    def erase(self, blocks: np.ndarray) -> None:
        """Makes blocks that may hold NaN or infinity harmless for whoever takes them next."""
        index = torch.from_numpy(blocks).long()
        for layer in (*self.keys, *self.values):
            layer[index.to(layer.device)] = 0
