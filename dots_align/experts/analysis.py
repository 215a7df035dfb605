"""The analysis of one checkpoint or a series: a model in memory at a time, the rest is counts and files of routes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dots_align.checkpoint import checkpoints, load_model, model_directories, step_of, stored_dtype
from dots_align.config import ModelSection
from dots_align.experts import measures
from dots_align.experts.domains import Domain, token_ids
from dots_align.experts.routing import Routes, differences, record
from dots_align.experts.weights import WeightChange, weight_change
from dots_align.model.router import moe_layers
from dots_align.report.collect import distinct_names
from dots_align.runtime import device, logger


@dataclass(frozen=True)
class Shift:
    """How a checkpoint routes the same tokens compared with another one, each by domain, [layers].

    `shift`: share of tokens whose set of experts differs; `overlap`: share of the chosen experts that both chose.
    """

    other: str
    shift: dict[str, np.ndarray]
    overlap: dict[str, np.ndarray]


@dataclass(frozen=True)
class CheckpointLoad:
    """One checkpoint. `counts`: slots by domain, int64 [layers, experts]; `shifts` from the first and the previous."""

    name: str
    path: str
    step: int | None
    counts: dict[str, np.ndarray]
    shifts: list[Shift] = field(default_factory=list)

    @property
    def shares(self) -> np.ndarray:
        """[domains, layers, experts]"""
        return np.stack([measures.shares(counts) for counts in self.counts.values()])


@dataclass(frozen=True)
class Analysis:
    """`layers` are the model's numbers of its MoE layers; `tokens` by domain; `change` from the first checkpoint to the
    last, None of one checkpoint or of adapters.
    """

    layers: list[int]
    num_experts: int
    experts_per_token: int
    domains: list[Domain]
    tokens: dict[str, int]
    checkpoints: list[CheckpointLoad]
    change: WeightChange | None


def analyse(
    paths: Sequence[Path], domains: Sequence[Domain], max_tokens: int = 100_000, max_length: int = 2048
) -> Analysis:
    """Loads one checkpoint after the other and routes all domains through it.

    Args:
        paths: checkpoint directories, or run directories, which stand for all of their checkpoints in order.
        max_tokens: of each domain. max_length: of a sequence; longer records are cut.

    Raises:
        ValueError: what cannot be loaded or read, or checkpoints of different shapes or tokenizers.
    """
    found = expand(paths)
    with tempfile.TemporaryDirectory(prefix="dots_align_experts_") as scratch:
        series = _Series(list(domains), max_tokens, max_length, Path(scratch))
        for path, name in zip(found, distinct_names([path.resolve() for path in found]), strict=True):
            series.add(path, name)
    change = None
    if len(found) > 1:
        change = weight_change(found[0], found[-1], series.layers, series.num_experts)
    tokens = {name: sum(map(len, ids)) for name, ids in series.ids.items()}
    shape = series.layers, series.num_experts, series.k
    return Analysis(*shape, series.domains, tokens, series.loads, change)


def expand(paths: Sequence[Path]) -> list[Path]:
    """Checkpoints, with those of run directories in their places."""
    found: list[Path] = []
    for path in paths:
        inside = [] if (path / "config.json").is_file() else checkpoints(path) if path.is_dir() else []
        found += inside or [path]
    return found


class _Series:
    """What has been measured so far; the routes of the first and of the latest checkpoint wait to be compared."""

    def __init__(self, domains: list[Domain], max_tokens: int, max_length: int, scratch: Path) -> None:
        self.domains, self.max_tokens, self.max_length, self.scratch = domains, max_tokens, max_length, scratch
        self.ids: dict[str, list[list[int]]] = {}
        self.layers: list[int] = []
        self.num_experts = self.k = 0
        self.loads: list[CheckpointLoad] = []
        self._routes: list[dict[str, Routes]] = []

    def add(self, path: Path, name: str) -> None:
        number = len(self.loads)
        routes = self._route(path, number)
        counts = {domain: found.counts(self.num_experts) for domain, found in routes.items()}
        shifts = [self._shift(routes, other) for other in dict.fromkeys((0, number - 1)) if 0 <= other < number]
        step = step_of(path.resolve()) if path.resolve().name.startswith("checkpoint-") else None
        self.loads.append(CheckpointLoad(name, str(path), step, counts, shifts))
        self._routes.append(routes)
        if number > 1:  # only the first and the previous one are needed again
            for found in self._routes[number - 1].values():
                found.path.unlink()

    def _route(self, path: Path, number: int) -> dict[str, Routes]:
        section = ModelSection(path=str(path))
        dtype = stored_dtype(model_directories(section)[0])
        model, tokenizer = load_model(section.model_copy(update={"dtype": dtype}), device())
        self._agree(model.eval(), tokenizer, path)
        logger.info("routing %s", path)
        return {
            domain.name: record(model, self.ids[domain.name], self.scratch / f"{number}-{place}")
            for place, domain in enumerate(self.domains)
        }

    def _agree(self, model: Any, tokenizer: Any, path: Path) -> None:
        """Takes shape and token ids from the first checkpoint; the others have to have the same."""
        blocks = moe_layers(model)
        if not blocks:
            raise ValueError(f"{path}: has no layer with routed experts")
        config = blocks[0][1].gate.config
        length = min(self.max_length, config.max_position_embeddings)
        shape = [index for index, _ in blocks], config.n_routed_experts, config.num_experts_per_tok
        ids = {d.name: list(token_ids(d, tokenizer, self.max_tokens, length)) for d in self.domains}
        if self.loads and (shape != (self.layers, self.num_experts, self.k) or ids != self.ids):
            raise ValueError(
                f"{path}: has other layers, experts or tokens than {self.loads[0].path}; only checkpoints of one model "
                "can be compared"
            )
        (self.layers, self.num_experts, self.k), self.ids = shape, ids

    def _shift(self, routes: dict[str, Routes], other: int) -> Shift:
        pairs = {name: differences(self._routes[other][name], found) for name, found in routes.items()}
        shift, overlap = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
        return Shift(self.loads[other].name, shift, overlap)
