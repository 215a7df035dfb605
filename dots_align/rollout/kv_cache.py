"""Keys and values of a running batch: a prompt's once per group, a response's once per sequence.

The cache has `num_groups` group slots of `group_size` rows each; row `g * group_size + j` is the j-th sample of the
prompt in slot g. Prompts are what a group has in common, so their keys and values are stored, and attended to, once
per group.
"""

from __future__ import annotations

import torch


class GroupedKVCache:
    """Prefix [G, H, P, D] and suffix [G * W, H, T, D] keys and values, for each layer.

    G group slots, W rows a group, H key-value heads, P longest prompt, T longest response, D head dimension.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        num_groups: int,
        group_size: int,
        prefix_capacity: int,
        suffix_capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_groups, self.group_size = num_groups, group_size
        prefix = (num_groups, num_heads, prefix_capacity, head_dim)
        suffix = (num_groups * group_size, num_heads, suffix_capacity, head_dim)

        def allocate(shape: tuple[int, ...]) -> list[torch.Tensor]:
            # Zeros, not empty: padding is masked, but 0 * NaN from stale memory would not be.
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

        self.prefix_keys, self.prefix_values = allocate(prefix), allocate(prefix)
        self.suffix_keys, self.suffix_values = allocate(suffix), allocate(suffix)
        self.prefix_lengths = torch.zeros(num_groups, dtype=torch.long, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes held by all keys and values."""
        tensors = [*self.prefix_keys, *self.prefix_values, *self.suffix_keys, *self.suffix_values]
        return sum(t.numel() * t.element_size() for t in tensors)
