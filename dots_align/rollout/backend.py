"""What the RL loop asks of whatever generates for it: our engine, or a vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from dots_align.config import RolloutSection
from dots_align.rollout.engine import Failed, RolloutEngine
from dots_align.rollout.scheduler import Finished
from dots_align.rollout.sync import Certificate, Manifest, WeightStream, manifest, stream
from dots_align.rollout.vllm import VllmBackend
from dots_align.types import GenerationRequest, Sample


class RolloutBackend(Protocol):
    """Generates samples with weights that it can be sent."""

    def generate(
        self,
        requests: list[GenerationRequest],
        return_routes: bool = False,
        on_finished: Callable[[int], object] | None = None,
    ) -> list[list[Sample]]:
        """For each request, in order, its samples, in order.

        Raises:
            ValueError: a request is impossible here; or the weights are not those of the last update.
        """
        ...

    def stream(self, requests: list[GenerationRequest], return_routes: bool = False) -> Iterator[Finished | Failed]:
        """The samples of requests as they end, numbered by their place in the list; of a sharded model all processes
        read to the end.

        Raises:
            ValueError: as `generate`, unless an event says which request cannot be done.
        """
        ...

    def update_weights(self, stream: WeightStream, declared: Manifest) -> Certificate | None:
        """Takes a model's weights, and proves that it has them (by a certificate, where it can give one), or raises
        ValueError and refuses to generate until a later update succeeds.
        """
        ...


def make_backend(rollout: RolloutSection, policy: Any) -> RolloutBackend:
    """The back end that a recipe names."""
    if rollout.vllm is not None:
        return VllmBackend(rollout.vllm, policy.config.vocab_size, next(policy.parameters()).device)
    kv_cache_bytes = None if rollout.kv_cache_gib is None else int(rollout.kv_cache_gib * 2**30)
    return RolloutEngine(policy, rollout.max_num_sequences, kv_cache_bytes, rollout.prefill_chunk_tokens)


def refresh(backend: RolloutBackend, policy: Any) -> None:
    """Lets a back end know what the policy has become; our engine runs the policy's own tensors. Collective."""
    if isinstance(backend, VllmBackend):
        declared = manifest(policy, backend.dtype).with_canary(policy)
        backend.update_weights(stream(policy, declared), declared)
