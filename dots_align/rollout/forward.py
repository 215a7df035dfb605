"""One forward of the trainer's module over a plan, and what else the engine asks of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from dots_align.model.expert_parallel import gathered, is_sharded
from dots_align.model.router import RecordedRoutes, moe_layers, record_routes
from dots_align.rollout import sampling
from dots_align.rollout.attention import CachedStep, IdleStep, RolloutStep, rollout_mode
from dots_align.rollout.kv_cache import BlockPool
from dots_align.rollout.native import NativeForward, native_forward
from dots_align.rollout.plan import ForwardPlan
from dots_align.rollout.sampling import SamplingTable

Sampled = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Forward(Protocol):
    """What the engine asks of a model. The bits of a result may differ between implementations, by rounding."""

    def __call__(self, plan: ForwardPlan, pool: BlockPool, want_routes: bool) -> tuple[torch.Tensor, np.ndarray | None]:
        """Logits [M, V] where the plan wants them, and routes [N, layers, k] uint8 if asked for."""
        ...

    def idle(self) -> None:
        """Takes part in a forward of other processes, with nothing to compute for itself."""
        ...

    def sample(self, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor) -> Sampled:
        """As `sampling.sample`."""
        ...

    def first_broken_layer(self, tokens: list[int]) -> str:
        """Where NaN or infinity first appears in a plain forward over tokens [T], for an error message."""
        ...


class TorchForward:
    """Runs plans through transformers' own module, on any device, sharded or under adapters."""

    def __init__(self, model: Any, recorded: RecordedRoutes) -> None:
        self.model, self.recorded = model, recorded
        self.device = next(model.parameters()).device
        self.has_routes = bool(moe_layers(model))

    def __call__(self, plan: ForwardPlan, pool: BlockPool, want_routes: bool) -> tuple[torch.Tensor, np.ndarray | None]:
        """Logits [M, V] where the plan wants them, and routes [N, layers, k] uint8 if asked for."""
        logits = self._run(plan.tokens, plan.positions, CachedStep(plan, pool), plan.logits_at)
        routes = self.recorded.take() if self.has_routes else None
        return logits, routes.cpu().numpy() if want_routes and routes is not None else None

    def idle(self) -> None:
        """A forward of one token that nobody asked for, if others compute with this process."""
        if not is_sharded(self.model):
            return
        nothing = np.zeros(1, np.int32)
        self._run(nothing, nothing, IdleStep(), nothing)
        self.recorded.routes.clear()

    def sample(self, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor) -> Sampled:
        return sampling.sample(logits, table, positions)

    def first_broken_layer(self, tokens: list[int]) -> str:
        found = _first_broken_layer(self.model, tokens)
        self.recorded.routes.clear()
        return found

    def _run(self, tokens: np.ndarray, positions: np.ndarray, step: RolloutStep, last: np.ndarray) -> torch.Tensor:
        def index(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(self.device, torch.long)

        # A mask given as a dict is taken as prepared: masking is the step's own business.
        output = self.model(
            input_ids=index(tokens)[None],
            position_ids=index(positions)[None],
            attention_mask={"full_attention": None},
            use_cache=False,
            rollout_step=step,
            logits_to_keep=index(last),
        )
        return output.logits[0]


class CompiledForward:
    """Runs plans in C++; for the rest asks the torch forward."""

    def __init__(self, compiled: NativeForward, torch_forward: TorchForward) -> None:
        self.compiled, self.torch_forward = compiled, torch_forward
        self.first_broken_layer = torch_forward.first_broken_layer

    def __call__(self, plan: ForwardPlan, pool: BlockPool, want_routes: bool) -> tuple[torch.Tensor, np.ndarray | None]:
        return self.compiled(plan, pool, want_routes)

    def idle(self) -> None:
        """Nobody waits: with whole layers in memory a forward is each process's own."""

    def sample(self, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor) -> Sampled:
        if table.filtered:
            return sampling.sample(logits, table, positions)
        return self.compiled.sample_tokens(logits, table.temperature, table.keys, positions)


@contextmanager
def rolling_out(model: Any, native: bool = True) -> Iterator[Forward]:
    """The model as the engine needs it, with whole layers in memory if it is sharded; afterwards as it was.

    Args:
        native: use the C++ forward if it can be had.
    """
    with ExitStack() as stack:
        stack.enter_context(rollout_mode(model))
        if is_sharded(model):
            stack.enter_context(gathered(model))
        forward = TorchForward(model, stack.enter_context(record_routes(model)))
        compiled = native_forward(model) if native else None
        yield forward if compiled is None else CompiledForward(compiled, forward)


def _first_broken_layer(model: Any, tokens: list[int]) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    broken: list[str] = []

    def watch(name: str):
        def look(_module: Any, _arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not broken and not bool(torch.isfinite(hidden).all()):
                broken.append(name)

        return look

    places = [("the embedding", base.model.embed_tokens)]
    places += [(f"layer {index}", layer) for index, layer in enumerate(base.model.layers)]
    places += [("the final norm", base.model.norm), ("the head", base.lm_head)]
    handles = [module.register_forward_hook(watch(name)) for name, module in places]
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        model.config._attn_implementation = implementation
        for handle in handles:
            handle.remove()
    return broken[0] if broken else "no layer of a forward over the whole sequence"
