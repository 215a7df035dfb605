"""Sends domains through a checkpoint and keeps, on disk, which experts every token went to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dots_align.model.packed import micro_batches, pack
from dots_align.model.router import decoder_of, record_routes

BATCH_TOKENS = 8192
CHUNK = 1 << 15  # tokens that are looked at at once


class Routes:
    """The experts of every token of a domain, uint8 [token, layer, k] in a file: two bytes a token and layer at k = 2.

    Tokens come in the order in which sequences were given, so files of two checkpoints can be laid side by side.
    """

    def __init__(self, path: Path, num_layers: int, k: int) -> None:
        self.path, self.shape = path, (num_layers, k)

    def chunks(self) -> Iterator[np.ndarray]:
        """[n, layers, k] of at most CHUNK tokens at a time."""
        rows = np.memmap(self.path, dtype=np.uint8, mode="r").reshape(-1, *self.shape)
        for start in range(0, len(rows), CHUNK):
            yield np.asarray(rows[start : start + CHUNK])

    def counts(self, num_experts: int) -> np.ndarray:
        """[layers, experts] int64: the slots that each expert got."""
        layers = self.shape[0]
        offsets = num_experts * np.arange(layers)[None, :, None]
        total = np.zeros(layers * num_experts, dtype=np.int64)
        for chunk in self.chunks():
            total += np.bincount((chunk + offsets).ravel(), minlength=len(total))
        return total.reshape(layers, num_experts)


def differences(first: Routes, second: Routes) -> tuple[np.ndarray, np.ndarray]:
    """(share of tokens whose set of experts differs, share of their experts that both chose), each [layers].

    Both routes are of the same tokens.
    """
    differ, common, tokens = 0.0, 0.0, 0
    for one, other in zip(first.chunks(), second.chunks(), strict=True):
        differ = differ + (np.sort(one, -1) != np.sort(other, -1)).any(-1).sum(0)
        common = common + (one[..., :, None] == other[..., None, :]).any(-1).mean(-1).sum(0)
        tokens += len(one)
    return np.asarray(differ) / tokens, np.asarray(common) / tokens


@torch.inference_mode()
def record(model: Any, sequences: Sequence[list[int]], path: Path) -> Routes:
    """Runs `sequences` through the decoder (the head computes nothing) and writes their tokens' experts to `path`."""
    decoder, device = decoder_of(model), next(model.parameters()).device
    routes: list[bytes] = [b""] * len(sequences)
    shape: tuple[int, int] = (0, 0)
    for members in micro_batches([len(ids) for ids in sequences], BATCH_TOKENS):
        with record_routes(model) as recorded:
            decoder(**pack([sequences[i] for i in members], device).model_inputs())
        chosen = recorded.take().cpu()
        shape = (chosen.shape[1], chosen.shape[2])
        for index, rows in zip(members, chosen.split([len(sequences[i]) for i in members]), strict=True):
            routes[index] = rows.contiguous().numpy().tobytes()
    path.write_bytes(b"".join(routes))
    return Routes(path, *shape)
