"""dots1 as it is defined, written down once more: the MoE block in plain torch, and the mistakes others made in it.

Everything that runs a checkpoint is compared with this forward. `Rules()` is the model; every other value is a known
mistake, computed to see whether it gives the logits of an engine that deviates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dots_align.model.router import moe_layers
from dots_align.parity.observation import Observation, Question


@dataclass(frozen=True)
class Rules:
    """How the MoE block and the rotary embedding are computed. The defaults are dots1.

    `biased_choice`: the correction bias takes part in choosing experts. `biased_gates`: it stays in their gate values.
    `routed_scalings`: how often the routed sum is multiplied by `routed_scaling_factor`; `shared_scalings`, the shared
    experts. `softmax`: scores by softmax in place of sigmoid. `normalised`: gate values sum to one (if the model's do).
    `rope_theta`: None for the checkpoint's own.
    """

    biased_choice: bool = True
    biased_gates: bool = False
    routed_scalings: int = 1
    shared_scalings: int = 0
    softmax: bool = False
    normalised: bool = True
    rope_theta: float | None = None


@torch.no_grad()
def observe(model: Any, questions: Sequence[Question], rules: Rules = Rules()) -> Observation:
    """Logits, routes and score gaps of each question under the rules, in the dtype of the model.

    Args:
        model: a whole `Dots1ForCausalLM`; as it was afterwards.
    """
    logits, routes, gaps = [], [], []
    with _following(model, rules) as seen:
        for question in questions:
            seen.clear()
            ids = torch.tensor([question.token_ids], device=model.device)
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
            routes.append(torch.stack([chosen for chosen, _ in seen], 1).cpu())
            gaps.append(torch.stack([gap for _, gap in seen], 1).cpu())
    return Observation(logits=logits, routes=routes, gaps=gaps)


@contextmanager
def _following(model: Any, rules: Rules) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Every MoE block computes by the rules; what they chose is collected. Attention is transformers' eager one."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    blocks = [block for _, block in moe_layers(model)]
    attention, training = model.config._attn_implementation, model.training
    rotary = model.model.rotary_emb
    frequencies = rotary.inv_freq.clone()
    model.config._attn_implementation = "eager"
    model.eval()
    if rules.rope_theta is not None:
        steps = torch.arange(0, model.config.head_dim, 2, device=frequencies.device) / model.config.head_dim
        rotary.inv_freq.copy_(rules.rope_theta**-steps)
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = functools.partial(_moe, block, rules, seen)
    try:
        yield seen
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before
        rotary.inv_freq.copy_(frequencies)
        model.config._attn_implementation = attention
        model.train(training)


def _moe(block: Any, rules: Rules, seen: list[Any], hidden_states: torch.Tensor) -> torch.Tensor:
    """hidden_states [B, T, H] -> the same shape."""
    hidden = hidden_states.flatten(0, -2)
    chosen, gates, gap = _route(block, rules, hidden)
    seen.append((chosen.byte(), gap))
    factor = block.config.routed_scaling_factor
    routed = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in chosen.unique().tolist():
        token, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token] @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
        out = (F.silu(gate) * up) @ block.experts.down_proj[expert].T
        routed[token] += out.float() * gates[token, place, None]
    routed = routed * factor**rules.routed_scalings
    shared = block.shared_experts(hidden).float() * factor**rules.shared_scalings
    return (routed + shared).to(hidden.dtype).view_as(hidden_states)


def _route(block: Any, rules: Rules, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H] -> chosen experts [T, k], gate values [T, k] before scaling, gap [T] to the next expert."""
    config, k = block.config, block.config.num_experts_per_tok
    logits = hidden.float() @ block.gate.weight.float().T
    scores = logits.softmax(-1) if rules.softmax else logits.sigmoid()
    biased = scores + block.gate.e_score_correction_bias
    choice = _in_best_groups(biased if rules.biased_choice else scores, config.n_group or 1, config.topk_group or 1)
    best = choice.topk(min(k + 1, choice.shape[-1]), -1)
    chosen = best.indices[:, :k]
    gap = best.values[:, k - 1] - best.values[:, -1]
    gates = (biased if rules.biased_gates else scores).gather(1, chosen)
    if config.norm_topk_prob and rules.normalised:
        gates = gates / gates.sum(-1, keepdim=True)
    return chosen, gates, gap


def _in_best_groups(choice: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """Experts outside the `kept` groups with the best two members cannot be chosen; dots.llm1 has one group of all."""
    if groups == kept:
        return choice
    grouped = choice.unflatten(-1, (groups, -1))
    best = grouped.topk(2, -1).values.sum(-1).topk(kept, -1).indices
    closed = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter(-1, best, False)
    return grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
