"""Keeping the experts evenly used: a balance loss per sequence, and the policy of the router's correction bias.

Both are DeepSeek-V3's (arXiv:2412.19437, section 2.1.2): the bias moves against the load without any gradient, the
loss keeps single sequences from crowding into few experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from dots_align.model.packed import NO_PREFIX
from dots_align.model.router import (
    LoadMonitor,
    Reduce,
    decoder_inputs,
    decoder_of,
    in_backward,
    is_training_forward,
    moe_layers,
    real_tokens,
)

# The keyword under which a decoder call hands its sequences to its layers.
_HANDED_DOWN = "balance_share"


@dataclass(frozen=True)
class Sequences:
    """Which of a forward's N tokens (rows one after the other) make up its S sequences.

    `owner` [N] int64, the segment of each token; `real` [N] fp32, 0 for padding; `sizes` [S] fp32, real tokens of each
    sequence. Segments are sequences, unless some continue others (`prefixes`, as in `PackedBatch`): then a token that
    was computed once for several sequences belongs to each of them, and those that are continued are none themselves,
    of size 0.
    """

    owner: torch.Tensor
    real: torch.Tensor
    sizes: torch.Tensor
    prefixes: torch.Tensor | None = None

    @staticmethod
    def of(inputs: Mapping[str, Any]) -> Sequences:
        """The sequences of a decoder call: those between `cu_seq_lens_q` (one row) with the `prefix_segments` they
        continue, or those whose `position_ids` start at 0, or else the rows; without what a 2-D `attention_mask` says
        is padding.
        """
        real = real_tokens(inputs)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        rows, width = tokens.shape[:2]
        boundaries, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
        if boundaries is not None:
            ends = boundaries[1:].to(real.device).long()
            owner, count = torch.bucketize(torch.arange(len(real), device=real.device), ends, right=True), len(ends)
        elif positions is not None:
            starts = positions.expand(rows, width) == 0
            starts[:, 0] = True
            owner = starts.flatten().cumsum(0) - 1
            count = int(owner[-1]) + 1  # waits for the device, once a forward
        else:
            owner, count = torch.arange(rows, device=real.device).repeat_interleave(width), rows
        prefixes = inputs.get("prefix_segments")
        alone = Sequences(owner, real, real.new_zeros(count), prefixes)
        return replace(alone, sizes=alone.sums(real[:, None]).squeeze(-1))

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """[N, X] of tokens -> [S, X], added up over each sequence."""
        found = values.new_zeros(len(self.sizes), values.shape[1]).index_add(0, self.owner, values)
        if self.prefixes is None:
            return found
        continues = (self.prefixes != NO_PREFIX).to(values.dtype).unsqueeze(-1)
        continued = self.prefixes.clamp(min=0)
        whole = found + found[continued] * continues
        is_continued = torch.zeros_like(continues).index_add_(0, continued, continues) > 0
        return whole.masked_fill(is_continued, 0.0)


def count_sequences(inputs: Mapping[str, Any]) -> int:
    """How many sequences with at least one real token a batch of model inputs holds, by the rules of `Sequences.of`."""
    return int((Sequences.of(inputs).sizes > 0).sum())


def sequence_balance(logits: torch.Tensor, chosen: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Sum over sequences of `sum_i f_i P_i`: 1 for a sequence whose tokens spread evenly, up to experts / k.

    In a sequence of T tokens, `f_i` is experts / (k T) times the tokens that chose expert i, and `P_i` the mean over
    tokens of `s_i / sum_j s_j` with sigmoid scores s. Gradients flow through P alone. What was chosen counts, so the
    correction bias takes part in f, as in the routing itself.

    Args:
        logits: [N, experts] of the router. chosen: [N, k] expert ids.

    Returns:
        a scalar in the dtype of `logits`.
    """
    num_experts, k = logits.shape[1], chosen.shape[1]
    real, sizes = sequences.real.to(logits.dtype).unsqueeze(-1), sequences.sizes.to(logits.dtype).clamp(min=1)
    slots = torch.zeros_like(logits).scatter_add_(1, chosen, real.expand(chosen.shape))
    frequencies = sequences.sums(slots) * (num_experts / k)
    scores = logits.sigmoid()
    shares = sequences.sums(scores / scores.sum(-1, keepdim=True) * real)
    return ((shares * frequencies).sum(-1) / sizes.square()).sum()


class _AddLoss(torch.autograd.Function):
    """Passes a tensor on; in backward, `loss` gets the gradient 1, as if it were a part of the final loss."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.dtype = loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,) = gradients
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device)


@dataclass(frozen=True)
class _Share:
    """What a training forward tells its layers: its sequences, and the factor of their losses."""

    sequences: Sequences
    factor: float


class BalanceLoss:
    """Adds the sequence-wise balance loss to whatever the model is trained with, in backward.

    The loss is attached to the routing weights on their way into the experts: forward nothing changes, backward its
    gradient joins theirs. So it needs no place in a trainer's loss, and works under activation checkpointing, FSDP2
    and adapters. Forwards without gradients, and those that are `router.idle`, are left alone.

    What a forward adds to the gradients is `coef * scale` times the gradient of the sum, over its sequences and over
    the MoE layers, of `sequence_balance`. It does not go through the trainer's loss: what the trainer does to its loss
    (dividing by accumulation steps or tokens) does not touch it, averaging gradients over processes does. For `coef`
    times the mean over all N sequences of an optimizer step, however they are cut into micro-batches and processes,
    set `scale` before the step's first forward to `num_processes / N` (FSDP2, DDP and DeepSpeed average; alone it is
    `1 / N`). N: `count_sequences` of every micro-batch, summed over processes.

    Not for fp16 with loss scaling: the scaler would divide gradients that were never multiplied.

    Args:
        model: hooks on it work for as long as it lives. coef: the weight of the loss.
        reduce: where given, `take` reports over all processes; then it is a collective call.
    """

    def __init__(self, model: nn.Module, coef: float, reduce: Reduce | None = None) -> None:
        self.coef, self.reduce = coef, reduce
        self.scale: float | None = None
        self._share: _Share | None = None  # of the layer that runs
        self._logits: torch.Tensor | None = None
        blocks = [block for _, block in moe_layers(model)]
        # [2] fp64: summed losses, and the sequences they are of, once for each layer.
        self._sums, self._gate = torch.zeros(2, dtype=torch.float64), blocks[0].gate
        decoder = decoder_of(model)
        decoder.register_forward_pre_hook(self._announce_hook(), with_kwargs=True)
        for layer in decoder.layers:
            layer.register_forward_pre_hook(self._receive_hook(), with_kwargs=True)
        for block in blocks:
            block.gate.register_forward_hook(self._logits_hook())
            block.experts.register_forward_pre_hook(self._attach_hook())

    # Hooks are functions, not bound methods: deepcopy of the model would copy this object with them.
    def _announce_hook(self):
        def announce(_decoder: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]):
            if not is_training_forward():
                return None
            assert self.scale is not None, "BalanceLoss.scale has to be set before the first training forward"
            share = _Share(Sequences.of(decoder_inputs(arguments, keywords)), self.coef * self.scale)
            # As an argument of every layer, and not in a variable here: checkpointing recomputes a layer with the
            # arguments it had, when the next micro-batch's forward may already have run.
            return arguments, {**keywords, _HANDED_DOWN: share}

        return announce

    def _receive_hook(self):
        def receive(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]):
            self._share = keywords.pop(_HANDED_DOWN, None)
            return arguments, keywords

        return receive

    def _logits_hook(self):
        def keep(_gate: nn.Module, _arguments: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
            if self._share is not None:
                self._logits = logits

        return keep

    def _attach_hook(self):
        def attach(_experts: nn.Module, arguments: tuple[Any, ...]):
            if self._share is None:
                return None
            assert self._logits is not None
            hidden_states, chosen, weights, *others = arguments
            share, logits, self._logits = self._share, self._logits, None
            loss = sequence_balance(logits, chosen, share.sequences)
            if not in_backward():
                self._count(loss.detach(), share.sequences)
            return hidden_states, chosen, _AddLoss.apply(weights, loss * share.factor), *others

        return attach

    def _count(self, loss: torch.Tensor, sequences: Sequences) -> None:
        counted = torch.stack([loss.double(), (sequences.sizes > 0).sum().double()])
        self._sums = self._sums.to(loss.device) + counted

    def take(self) -> float | None:
        """Mean of `sequence_balance` over sequences and layers since the last call (1 = even), or None without any.

        Times `coef` and the number of MoE layers, it is the term of the loss.
        """
        # On the device even if this process has counted nothing: the others wait for it in the collective.
        sums = self._sums.to(self._gate.e_score_correction_bias.device)
        self._sums = torch.zeros_like(sums)
        if self.reduce is not None:
            self.reduce(sums)
        total, count = sums.tolist()
        return total / count if count else None


class BiasPolicy:
    """What training does to `e_score_correction_bias`, after each optimizer step.

    - `frozen`: nothing; and that nobody else changed it is checked.
    - `track`: nothing; but the updates that `update` would make are added up and reported.
    - `update`: `bias_i += rate * sign(mean load - load_i)`, the load being that of the step: all micro-batches, all
      processes (`LoadMonitor.reduce`). Loads are whole numbers, so every process does exactly the same.

    The bias is a buffer of the model and saved with it; nothing else has to be restored to go on, except that `track`
    adds up from zero again. (A checkpoint of an adapter alone holds no buffers: `update` needs the base model saved.)

    Args:
        monitor: counts the load; it may be read by others too.
        policy, rate: `router.bias_policy` and `router.bias_update_rate` of the recipe.

    Make it when the weights are in place (loaded or resumed): what it finds is what `frozen` means.

    Raises:
        ValueError: a bias is not fp32, where small updates would be lost.
    """

    def __init__(self, monitor: LoadMonitor, policy: Literal["frozen", "track", "update"], rate: float) -> None:
        self._monitor, self.policy, self.rate = monitor, policy, rate
        self._start = self._stacked()  # [layers, experts], like everything below
        self._would_be = torch.zeros_like(self._start, dtype=torch.float64)
        self._seen = monitor.slots()
        self._pressure = torch.zeros(2, dtype=torch.float64, device=self._start.device)  # sum over steps, steps

    def _biases(self) -> list[torch.Tensor]:
        # Looked up each time: moving the model to another device replaces its buffers.
        return [gate.e_score_correction_bias for gate in self._monitor.gates]

    def _stacked(self) -> torch.Tensor:
        biases = self._biases()
        for index, bias in zip(self._monitor.layers, biases, strict=True):
            if bias.dtype != torch.float32:
                raise ValueError(
                    f"layer {index}: e_score_correction_bias is {bias.dtype}, not float32; call keep_router_in_fp32 on "
                    "the model before casting it"
                )
        return torch.stack(biases).detach()

    @torch.no_grad()
    def after_step(self) -> None:
        """Applies the policy to the tokens of the step that has just been taken. Collective where the monitor is.

        Raises:
            ValueError: `frozen`, and a bias is not what it was.
        """
        if self.policy == "frozen":
            self._check_untouched()
            return
        slots = self._monitor.slots()
        load, self._seen = slots - self._seen.to(slots.device), slots
        if self._monitor.reduce is not None:
            self._monitor.reduce(load)
        total, num_experts = load.sum(-1, keepdim=True), load.shape[-1]
        # Exact: loads times experts are whole numbers far below 2^53. A step without tokens moves nothing.
        update = torch.sign(total - load * num_experts) * self.rate
        violation = (load * num_experts / total.clamp(min=1) - 1).abs().mean()
        trained = (total > 0).any().double()
        self._pressure += torch.stack([violation * trained, trained])
        if self.policy == "track":
            self._would_be += update
            return
        for bias, change in zip(self._biases(), update, strict=True):
            bias.add_(change)

    def _check_untouched(self) -> None:
        now = self._stacked()
        if torch.equal(now, self._start.to(now.device)):
            return
        changed = (now != self._start.to(now.device)).any(-1).nonzero().flatten().tolist()
        raise ValueError(
            f"layer {self._monitor.layers[changed[0]]} ({len(changed)} layers in all): e_score_correction_bias changed "
            "while router.bias_policy is frozen; find what writes to the buffer, or choose another policy"
        )

    @torch.no_grad()
    def take(self) -> dict[str, float]:
        """`bias_pressure`: mean over experts, layers and the steps since the last call of `|load_i / mean load - 1|`, 0
        = even (absent if no step trained a token). `bias_range`: largest minus smallest bias of the layer where that is
        largest; for `track` of the sum of the updates not made. Empty for `frozen`.
        """
        if self.policy == "frozen":
            return {}
        bias = self._stacked().double() if self.policy == "update" else self._would_be
        extent = (bias.amax(-1) - bias.amin(-1)).max()
        pressure, steps, extent = torch.cat([self._pressure, extent[None].to(self._pressure.device)]).tolist()
        self._pressure.zero_()
        return {**({"bias_pressure": pressure / steps} if steps else {}), "bias_range": extent}
