"""What a layer's tensors take between forward and backward, counted operation by operation.

Parameters, gradients and optimizer states are read off the sharded model; activations depend on how many tokens there
are and where they are routed, so they are counted here, as the code in `model` and transformers' dots1 keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dots_align.model.logprobs import CHUNK_BYTES, are_kept, chunks


@dataclass(frozen=True)
class MicroBatch:
    """The largest forward of a process.

    `tokens` in it; `scored` of them go through the head; `attended` counts tokens with the padding that packed
    attention adds; `sent` rows leave for experts (tokens times k) and `received` rows arrive at this process's own
    ones. `itemsize`: bytes of a number in the dtype of computation.
    """

    tokens: int
    scored: int
    attended: int
    sent: int
    received: int
    itemsize: int
    exchanged: bool


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer. `early` is kept from forward to backward by what comes before the experts (or the dense MLP),
    `late` by those; `in_forward` and `in_backward` are alive for a moment on top, at the worst one.
    """

    early: int
    late: int
    in_forward: int
    in_backward: int

    @property
    def kept(self) -> int:
        return self.early + self.late


def _norm(width: int, batch: MicroBatch, trained: frozenset[str], name: str) -> int:
    """RMSNorm keeps its input in fp32 and, where its weight is trained, the normalised input."""
    return batch.tokens * width * (4 + (batch.itemsize if name in trained else 0))


def _kept_input(width: int, rows: int, batch: MicroBatch, trained: frozenset[str], *names: str) -> int:
    """Linear layers keep their common input if one of them is trained."""
    return rows * width * batch.itemsize if any(name in trained for name in names) else 0


def _attention(config: Any, batch: MicroBatch, trained: frozenset[str]) -> int:
    """From the layer's input to the output projection."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    norms = _norm(hidden, batch, trained, "input_layernorm")
    norms += sum(_norm(heads, batch, trained, f"self_attn.{name}_norm") for name in "qk")
    # The kernel keeps its padded inputs and output, and a logarithm for each row; indices are int64.
    kernel = batch.attended * (4 * heads * batch.itemsize + 4 * config.num_attention_heads) + 40 * batch.tokens
    inputs = _kept_input(hidden, batch.tokens, batch, trained, *projections)
    return norms + kernel + inputs + _kept_input(heads, batch.tokens, batch, trained, "self_attn.o_proj")


def _mlp(width: int, prefix: str, batch: MicroBatch, trained: frozenset[str]) -> int:
    """Gate, its activation, up, and their product."""
    return 3 * batch.tokens * width * batch.itemsize + _kept_input(
        width, batch.tokens, batch, trained, f"{prefix}.down_proj"
    )


def dense_layer(config: Any, batch: MicroBatch, trained: frozenset[str]) -> LayerMemory:
    hidden, width = config.hidden_size, config.intermediate_size
    early = _attention(config, batch, trained) + _norm(hidden, batch, trained, "post_attention_layernorm")
    early += _kept_input(hidden, batch.tokens, batch, trained, "mlp.gate_proj", "mlp.up_proj")
    stream = batch.tokens * hidden * batch.itemsize
    return LayerMemory(early, _mlp(width, "mlp", batch, trained), stream, 3 * stream + stream * width // hidden)


def moe_layer(config: Any, batch: MicroBatch, trained: frozenset[str]) -> LayerMemory:
    hidden, width, size = config.hidden_size, config.moe_intermediate_size, batch.itemsize
    early = _attention(config, batch, trained) + _norm(hidden, batch, trained, "post_attention_layernorm")
    early += _kept_input(hidden, batch.tokens, batch, trained, "mlp.shared_experts.gate_proj", "mlp.gate")
    if size < 4 and "mlp.gate" in trained:
        early += 4 * batch.tokens * hidden  # the router's input in fp32
    early += 12 * batch.tokens * config.n_routed_experts  # its scores
    early += _mlp(width * config.n_shared_experts, "mlp.shared_experts", batch, trained)
    late = _kept_input(hidden, batch.received, batch, trained, "mlp.experts.gate_up_proj")
    late += 2 * batch.received * width * size  # gate and up
    late += _kept_input(width, batch.received, batch, trained, "mlp.experts.down_proj")
    late += batch.sent * hidden * size  # results, for the gradient of the routing weights
    late += 32 * batch.sent  # indices
    stream = batch.tokens * hidden * size
    sums = 2 * 4 * batch.tokens * hidden
    arrived = batch.received * hidden * size if batch.exchanged else 0
    # Forward: what arrived, the results here, and the results in the order of their homes. Backward: gradients of the
    # results as they leave, arrive and are sorted.
    in_forward = max(3 * arrived, sums) + stream
    in_backward = batch.sent * hidden * size + 2 * arrived + 2 * stream
    return LayerMemory(early, late, in_forward, in_backward)


def head(config: Any, batch: MicroBatch, trained: frozenset[str], scalar: bool = False) -> int:
    """The final norm and what the head keeps: its input (fp32 if it gives one number), and a few numbers per token."""
    hidden = config.hidden_size
    return _norm(hidden, batch, trained, "norm") + batch.scored * (hidden * (4 if scalar else batch.itemsize) + 40)


def logits_chunk(config: Any, batch: MicroBatch) -> int:
    """The fp32 logits that exist at one time."""
    parts = list(chunks(batch.scored, config.vocab_size, CHUNK_BYTES))
    return 4 * config.vocab_size * max((part.stop - part.start for part in parts), default=0)


def kept_logits(config: Any, batch: MicroBatch) -> int:
    """Those of them that backward does not compute again, and has beside their gradient."""
    kept = are_kept(batch.scored, config.vocab_size, CHUNK_BYTES)
    return 4 * config.vocab_size * batch.scored if kept else 0
