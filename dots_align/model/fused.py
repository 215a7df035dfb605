"""Lets the layers of transformers' dots1 use the native kernels, where they compute the same: packed batches on CPUs.

A layer's small operations (norms, rotation, attention over short segments, SwiGLU) take as long as its products when
each is an operation by itself. Everything that the kernels do not know (other devices, dtypes and shapes, caches,
dropout, windows) goes through transformers' own code.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.models.dots1 import modeling_dots1

from dots_align.model import attention
from dots_align.model.experts import SILU
from dots_align.model.native import kernels

LONGEST = 512  # tokens of a segment; over longer ones torch's blocked kernel is quicker


def use_kernels(model: nn.Module) -> None:
    """Of every norm, attention and gated MLP in the model; weights, names and hooks stay as they are. Copies of the
    model use them too.
    """
    forwards = {
        modeling_dots1.Dots1RMSNorm: _norm,
        modeling_dots1.Dots1Attention: _attention,
        modeling_dots1.Dots1MLP: _mlp,
    }
    for module in model.modules():
        if forward := forwards.get(type(module)):
            # A bound method on the instance, not a subclass: FSDP2 and adapters change classes, deepcopy rebinds it.
            module.forward = MethodType(forward, module)


def _plain(module: Any, *arguments: Any, **options: Any) -> Any:
    return type(module).forward(module, *arguments, **options)


def _norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight, width = module.weight, hidden_states.shape[-1]
    if not kernels.fits(weight, hidden_states) or width % kernels.LANES or weight.shape != (width,):
        return _plain(module, hidden_states)
    return kernels.norm(hidden_states, weight, module.variance_epsilon)


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if isinstance(module.act_fn, SILU) and kernels.can_gate(gate, up):
        return module.down_proj(kernels.swiglu(gate, up))
    return module.down_proj(module.act_fn(gate) * up)


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    bounds = options.get("cu_seq_lens_q")
    q_weight, k_weight, dim = module.q_norm.weight, module.k_norm.weight, module.head_dim
    if (
        bounds is None
        or module.config._attn_implementation != attention.IMPLEMENTATION
        or len(hidden_states) != 1
        or past_key_values is not None
        or module.sliding_window is not None
        or (module.training and module.attention_dropout)
        or dim % (2 * kernels.LANES)
        or not (q_weight.shape == k_weight.shape == (dim,))  # what gathers weights does so for their own module's call
        or not kernels.fits(q_weight, k_weight, hidden_states, *position_embeddings)
        or int(bounds.diff().max()) > LONGEST
    ):
        return _plain(module, hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    # Not [0]: the backward of a choice fills a tensor with zeros first.
    q, k, v = (project(hidden_states).squeeze(0) for project in (module.q_proj, module.k_proj, module.v_proj))
    trees = kernels.Trees.of(bounds, options.get("prefix_segments"))
    rotation = [x[0] for x in position_embeddings]
    eps = module.q_norm.variance_epsilon
    attended = kernels.attention(q, k, v, q_weight, k_weight, rotation, trees, module.scaling, eps)
    return module.o_proj(attended[None]), None
