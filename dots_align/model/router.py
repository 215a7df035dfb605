"""Watching the router: which experts tokens chose, how evenly, and whether two forwards agree; and keeping it in fp32.

Everything is read with hooks on transformers' own modules (`mlp.gate` gives logits, `mlp.experts` receives the
chosen ids), so what is reported is what was computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from dots_align.model.packed import NO_PREFIX

Reduce = Callable[[torch.Tensor], Any]
"""Sums a tensor over all processes, in place (`torch.distributed.all_reduce`)."""


def _named_blocks(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "experts") and hasattr(module, "gate") and "layers." in name
    ]


def moe_layers(model: nn.Module) -> list[tuple[int, Any]]:
    """(layer index, MoE block) of every layer that routes, in order. Works on the bare model and under adapters."""
    return [(int(name.rsplit("layers.", 1)[1].split(".")[0]), block) for name, block in _named_blocks(model)]


def decoder_of(model: nn.Module) -> Any:
    """The module whose `layers` hold the MoE blocks, however the model is wrapped."""
    name, _ = _named_blocks(model)[0]
    return model.get_submodule(name.rsplit("layers.", 1)[0].rstrip("."))


def decoder_inputs(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A decoder call's inputs by name."""
    return {**dict(zip(("input_ids", "attention_mask", "position_ids"), arguments, strict=False)), **keywords}


def in_backward() -> bool:
    """Whether autograd is running a backward here: a forward seen now is activation checkpointing's recomputation."""
    return torch._C._current_graph_task_id() != -1


_IDLE: ContextVar[bool] = ContextVar("idle", default=False)


@contextmanager
def idle() -> Iterator[None]:
    """Forwards inside belong to no step, though gradients are enabled: a process that has run out of micro-batches
    makes them to take part in collectives. Their tokens are no load, and no balance loss is added for them.
    """
    token = _IDLE.set(True)
    try:
        yield
    finally:
        _IDLE.reset(token)


def is_training_forward() -> bool:
    """Whether a forward that starts here is part of an optimizer step."""
    return torch.is_grad_enabled() and not _IDLE.get()


def real_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """1 for each of a decoder call's N = batch x width tokens, 0 where a 2-D `attention_mask` says padding.

    Returns:
        [N] fp32, rows one after the other.
    """
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask[:, -tokens.shape[1] :].flatten().float()  # a cache makes the mask wider than the tokens
    return torch.ones(tokens.shape[0] * tokens.shape[1], device=tokens.device)


def sequences_per_token(inputs: Mapping[str, Any]) -> torch.Tensor:
    """How many sequences each of a decoder call's N tokens is part of: 1, 0 for padding, and for a prompt that several
    responses continue (`PackedBatch.prefixes`) their number.

    Returns:
        [N] fp32, rows one after the other.
    """
    real, prefixes = real_tokens(inputs), inputs.get("prefix_segments")
    if prefixes is None:
        return real
    numbers = torch.bincount(prefixes[prefixes != NO_PREFIX], minlength=len(prefixes)).clamp(min=1)
    lengths = inputs["cu_seq_lens_q"].diff()
    return real * torch.repeat_interleave(numbers, lengths, output_size=len(real))


def keep_router_in_fp32(model: nn.Module) -> None:
    """Keeps every router's computation and correction bias in fp32, whatever the rest of the model does.

    `Dots1TopkRouter` casts its inputs to fp32, but autocast turns the product to bf16 all the same, and with it the
    gate values: so the gate runs with autocast off. `from_pretrained` leaves the bias in fp32 whatever the dtype, but
    a later `model.to(torch.bfloat16)` would round it, and with it the choices: so the gate's buffer keeps its values
    and dtype when the model is cast. Calling it again changes nothing. Copies of the model keep both.

    Raises:
        ValueError: a bias has already been rounded to another dtype.
    """
    for index, block in moe_layers(model):
        gate, dtype = block.gate, block.gate.e_score_correction_bias.dtype
        if getattr(gate._apply, "__func__", None) is _cast_all_but_bias:
            continue
        if dtype != torch.float32:
            raise ValueError(
                f"layer {index}: e_score_correction_bias is {dtype}, not float32, so the model was cast after loading; "
                "call keep_router_in_fp32 before the cast, or load the model in that dtype"
            )
        # Bound methods on the instance, not a subclass: FSDP2 and adapters change classes, deepcopy rebinds methods.
        gate.forward = MethodType(_forward_without_autocast, gate)
        gate._apply = MethodType(_cast_all_but_bias, gate)


def _forward_without_autocast(gate: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    with maybe_autocast(hidden_states.device.type, enabled=False):
        return type(gate).forward(gate, hidden_states)


def _cast_all_but_bias(gate: Any, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    bias = gate.e_score_correction_bias
    type(gate)._apply(gate, function, recurse)
    applied = gate.e_score_correction_bias
    if applied.dtype != torch.float32:
        gate.e_score_correction_bias = bias.to(applied.device)
    return gate


@dataclass
class RecordedRoutes:
    """Routes of the forwards inside `record_routes`: per forward one [tokens, layers, k] uint8 tensor of expert ids.

    `gaps` (fp32 [tokens, layers], only if asked for) is the distance in choice score (sigmoid + correction bias)
    between the last chosen and the first rejected expert: a tiny gap is a near-tie that rounding may flip. `shifted`
    (bool [tokens, layers], only under replay) says where the router would have chosen otherwise.
    """

    routes: list[torch.Tensor] = field(default_factory=list)
    gaps: list[torch.Tensor] = field(default_factory=list)
    shifted: list[torch.Tensor] = field(default_factory=list)

    def take(self) -> torch.Tensor:
        """The routes of the one forward since the last call."""
        (routes,) = self.routes
        self.routes.clear()
        return routes


@contextmanager
def record_routes(model: nn.Module, with_gaps: bool = False) -> Iterator[RecordedRoutes]:
    """Records the expert ids chosen by every token of every forward made inside the context."""
    layers = moe_layers(model)
    recorded = RecordedRoutes()
    pending: list[torch.Tensor] = []
    pending_gaps: list[torch.Tensor] = []
    handles = []

    def on_experts(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        pending.append(arguments[1].detach().to(torch.uint8))
        if len(pending) == len(layers):
            recorded.routes.append(torch.stack(pending, dim=1))
            pending.clear()
            if with_gaps:
                recorded.gaps.append(torch.stack(pending_gaps, dim=1))
                pending_gaps.clear()

    def on_gate(module: Any, _arguments: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
        choice = logits.detach().sigmoid() + module.e_score_correction_bias
        best = choice.topk(module.config.num_experts_per_tok + 1, dim=-1).values
        pending_gaps.append(best[:, -2] - best[:, -1])

    for _, block in layers:
        handles.append(block.experts.register_forward_pre_hook(on_experts))
        if with_gaps:
            handles.append(block.gate.register_forward_hook(on_gate))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


FREE = -1  # stands where replayed routes leave a token to its own choice


class RouteReplay:
    """Sends every token to given experts, in the forwards and backwards made while it is entered.

    Gate values are those of the current scores at the given experts, so gradients flow to the router through them. It
    has to stay entered until backward has run: activation checkpointing routes once more there.

    Args:
        routes: [tokens, layers, k] expert ids; FREE where a token may choose for itself (whole tokens at a time).
    """

    def __init__(self, model: nn.Module, routes: torch.Tensor) -> None:
        self._blocks = [block for _, block in moe_layers(model)]
        self._routes = routes.long()
        self._shifted: list[torch.Tensor] = []
        assert routes.shape[1:] == (len(self._blocks), self._blocks[0].top_k)

    def __enter__(self) -> RouteReplay:
        # On the instance, as in expert_parallel: both Dots1MoE.forward and its replacement there call it.
        for layer, block in enumerate(self._blocks):
            block.route_tokens_to_experts = functools.partial(self._route, layer, block)
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.route_tokens_to_experts

    def _route(self, layer: int, block: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own, _ = type(block).route_tokens_to_experts(block, logits)
        given = self._routes[:, layer]
        chosen = torch.where(given == FREE, own, given)
        if not in_backward():
            self._shifted.append((own.sort(-1).values != chosen.sort(-1).values).any(-1))
        weights = logits.sigmoid().gather(1, chosen)
        if block.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * block.routed_scaling_factor

    def shifted(self) -> torch.Tensor:
        """[tokens, layers] of the one forward: where the router itself would have chosen another set."""
        return torch.stack(self._shifted, dim=1)


def routes_of(recorded: bytes, num_tokens: int, num_layers: int, k: int) -> torch.Tensor:
    """[num_tokens, layers, k] int16 from `Sample.routes`; the last token, which was never fed, is FREE.

    Raises:
        ValueError: they are of another sequence, or of another model.
    """
    if len(recorded) != (num_tokens - 1) * num_layers * k:
        raise ValueError(
            f"routes of {len(recorded)} bytes do not belong to {num_tokens} tokens of a model with {num_layers} routed "
            f"layers and {k} experts a token"
        )
    found = torch.frombuffer(bytearray(recorded), dtype=torch.uint8).to(torch.int16)
    return torch.cat([found.view(-1, num_layers, k), found.new_full((1, num_layers, k), FREE)])


@dataclass(frozen=True)
class RouteFlips:
    """Where two forwards of one sequence chose different experts.

    `affected` [n] bool: positions at or after a token that went another way (its state differs, and later tokens
    attend to it). `num_roots` and `root_gap`: flips in the lowest layer that has any, which no other flip can have
    caused, and the largest score gap among them; a gap of about 1e-7 is rounding at a tie, a large one is a bug.
    `differ` [n, layers] bool: where the chosen sets are not the same.
    """

    affected: torch.Tensor
    num_roots: int
    root_gap: float
    differ: torch.Tensor


def find_flips(routes: torch.Tensor, gaps: torch.Tensor, other: bytes) -> RouteFlips:
    """Compares routes [n, layers, k] (with their score gaps [n, layers]) to those recorded as `Sample.routes`."""
    theirs = torch.frombuffer(bytearray(other), dtype=torch.uint8).view(-1, *routes.shape[1:]).to(routes.device)
    return flips_of(routes_differ(routes[: len(theirs)], theirs), gaps)


def routes_differ(routes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[n, layers] where the sets of experts of routes [n, layers, k] are not the same."""
    return (routes.sort(-1).values != others.sort(-1).values).any(-1)


def flips_of(differ: torch.Tensor, gaps: torch.Tensor, lengths: Sequence[int] | None = None) -> RouteFlips:
    """From where routes differ [n, layers] and the score gaps [at least n, layers] of one sequence, or of several, one
    after the other, of `lengths` (none 0) tokens: then flips are counted in each, and `root_gap` is the largest of all.
    """
    if not differ.any():
        return RouteFlips(differ.any(-1), 0, 0.0, differ)
    sizes = torch.tensor([len(differ)] if lengths is None else lengths, device=differ.device)
    sequence = torch.repeat_interleave(sizes, output_size=len(differ))
    counts = differ.new_zeros(len(sizes), differ.shape[1], dtype=torch.long).index_add_(0, sequence, differ.long())
    lowest = (counts > 0).int().argmax(-1)[sequence, None]  # 0 where no layer has any
    roots, root_gaps = (x[: len(differ)].gather(1, lowest).squeeze(1) for x in (differ, gaps))
    seen = differ.any(-1).cumsum(0)
    earlier = torch.cat([seen.new_zeros(1), seen[sizes.cumsum(0)[:-1] - 1]])
    return RouteFlips(seen > earlier[sequence], int(roots.sum()), float(root_gaps[roots].max()), differ)


class LoadMonitor:
    """Counts how many routed slots each expert got, over the forwards that train.

    A forward trains if gradients are enabled where the decoder starts, and it is not `idle`. Each of its tokens counts
    once for each sequence it is part of, so a prompt computed once for several responses counts for all of them: loads
    do not depend on what is shared. Padding does not count, nor does the recomputation of activation checkpointing.
    Nothing waits for the device before `take`.

    Args:
        model: hooks on it count for as long as it lives.
        reduce: where given, `take` reports the load over all processes; then it is a collective call.
    """

    def __init__(self, model: nn.Module, reduce: Reduce | None = None) -> None:
        blocks = moe_layers(model)
        self.layers = [index for index, _ in blocks]
        self.gates = [block.gate for _, block in blocks]
        self.reduce = reduce
        self.score_entropy = 0.0
        """How evenly the router scores the experts (before it chooses), as of the last `take`: the entropy of a
        token's scores over their sum, in units of log(experts) (1 = all alike), mean over tokens and layers.
        """
        self._totals: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None
        self._trains, self._weights = False, torch.empty(0)
        if blocks:
            decoder_of(model).register_forward_pre_hook(self._begin_hook(), with_kwargs=True)
        for row, (_, block) in enumerate(blocks):
            block.gate.register_forward_hook(self._entropy_hook(row))
            block.experts.register_forward_pre_hook(self._count_hook(row))

    # Hooks are functions, not bound methods: deepcopy of the model would copy the monitor with them.
    def _begin_hook(self):
        def begin(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._trains = is_training_forward() and not in_backward()
            if self._trains:
                self._weights = sequences_per_token(decoder_inputs(arguments, keywords)).double()

        return begin

    def _entropy_hook(self, row: int):
        def add(_gate: nn.Module, _arguments: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
            if self._trains and not in_backward():
                scores = logits.detach().sigmoid()
                total = scores.sum(-1)
                entropy = torch.special.entr(scores).sum(-1) / total + total.log()
                self._sums(logits.device)[row, -1] += (entropy * self._weights).sum()

        return add

    def _count_hook(self, row: int):
        def count(_experts: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if self._trains and not in_backward():
                chosen = arguments[1]
                slots = self._weights.unsqueeze(-1).expand(chosen.shape).reshape(-1)
                self._sums(chosen.device)[row, :-1].scatter_add_(0, chosen.reshape(-1), slots)

        return count

    def _sums(self, device: torch.device) -> torch.Tensor:
        """[layers, experts + 1] fp64 (exact as a counter): slots of each expert, then the tokens' score entropy."""
        if self._totals is None:
            shape = len(self.layers), self.gates[0].n_routed_experts + 1
            self._totals = torch.zeros(shape, dtype=torch.float64, device=device)
        self._totals = self._totals.to(device)
        return self._totals

    def slots(self) -> torch.Tensor:
        """[layers, experts] fp64, a copy: the slots of each expert since the beginning, in this process."""
        # The bias and not a weight tells the device: a process that has counted nothing takes part in collectives too,
        # and weights may be kept in host memory.
        return self._sums(self.gates[0].e_score_correction_bias.device)[:, :-1].clone()

    def take(self) -> list[list[float]] | None:
        """Share of routed slots of each expert, a row per MoE layer summing to 1, since the last call; None if none
        trained.
        """
        if not self.layers:
            return None
        totals = self._sums(self.gates[0].e_score_correction_bias.device)
        fresh = totals.clone() if self._taken is None else totals - self._taken.to(totals.device)
        self._taken = totals.clone()
        if self.reduce is not None:
            self.reduce(fresh)
        fresh = fresh.cpu()
        counts = fresh[:, :-1]
        slots = counts.sum(-1, keepdim=True)
        if not slots.any():
            return None
        gate = self.gates[0]
        per_token = fresh[:, -1] / slots.squeeze(-1) * gate.config.num_experts_per_tok
        self.score_entropy = float(per_token.mean()) / math.log(gate.n_routed_experts)
        return (counts / slots).tolist()


def load_metrics(load: list[list[float]]) -> dict[str, float]:
    """`max_violation` (largest expert load over the mean, minus 1, worst layer) and `entropy` (1 = even, mean over
    layers).
    """
    rows = torch.tensor(load, dtype=torch.float64)
    violation = (rows.max(dim=-1).values * rows.shape[-1] - 1).max()
    entropy = -(rows * rows.clamp(min=1e-12).log()).sum(-1) / torch.log(torch.tensor(float(rows.shape[-1])))
    return {"max_violation": float(violation), "entropy": float(entropy.mean())}
