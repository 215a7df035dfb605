"""The training engine of RL: log-probabilities of responses, optimizer steps over micro-batches, save and load.

Shaped like verl's BaseEngine (infer batch, train batch, save, load), so that the same code can serve there.
Micro-batches are a memory limit: the loss function gets the whole batch's denominators beforehand, so that cutting
the batch changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, get_scheduler

from dots_align.config import OptimSection
from dots_align.model.dots1 import lm_head
from dots_align.model.logprobs import token_logprobs
from dots_align.model.packed import micro_batches, pack
from dots_align.model.router import RecordedRoutes, record_routes
from dots_align.types import Trajectory

STATE_TENSORS, STATE = "training_state.safetensors", "training_state.json"


@dataclass(frozen=True)
class ResponseScores:
    """What a forward says about the responses of a micro-batch of b trajectories, whose longest response has T tokens.

    `members` [b] indices of the trajectories; `logprobs` [b, T] (0 where there is no token), `mask` [b, T];
    `entropy` [tokens]; `boundaries` [b + 1] of the packed sequences (prompt and response).
    """

    members: list[int]
    logprobs: torch.Tensor
    mask: torch.Tensor
    entropy: torch.Tensor
    boundaries: list[int]


LossFunction = Callable[[ResponseScores], tuple[torch.Tensor, dict[str, float]]]
Observer = Callable[[ResponseScores, RecordedRoutes], None]


@dataclass
class TokenMeans:
    """Means over micro-batches, weighted by response tokens."""

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float], tokens: int) -> None:
        self.tokens += tokens
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * tokens

    def means(self) -> dict[str, float]:
        return {name: total / self.tokens for name, total in self.sums.items()}


def response_scores(
    model: PreTrainedModel, trajectories: Sequence[Trajectory], members: list[int], temperature: float
) -> ResponseScores:
    """One forward over the packed prompts and responses of `members`; log-probs at the sampling temperature."""
    device = next(model.parameters()).device
    chosen = [trajectories[i] for i in members]
    batch = pack([t.prompt_ids + t.response_ids for t in chosen], device)
    hidden = model.get_decoder()(**batch.model_inputs()).last_hidden_state[0]
    boundaries = batch.cu_seq_lens.tolist()
    sizes = [len(t.response_ids) for t in chosen]
    # The state before a token predicts it, so a response is read one position early.
    firsts = [start + len(t.prompt_ids) - 1 for start, t in zip(boundaries, chosen, strict=False)]
    before = torch.cat([torch.arange(first, first + size) for first, size in zip(firsts, sizes, strict=True)]).to(
        device
    )
    targets = torch.tensor([token for t in chosen for token in t.response_ids], device=device)
    flat, entropy = token_logprobs(hidden[before] / temperature, lm_head(model).weight, targets)
    mask = torch.arange(max(sizes), device=device)[None] < torch.tensor(sizes, device=device)[:, None]
    logprobs = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    return ResponseScores(members, logprobs, mask.float(), entropy, boundaries)


class TrainingEngine:
    """A policy with its optimizer and schedule.

    Args:
        model: trained in place; every parameter that requires a gradient.
        optim: AdamW and the schedule, whose warm-up is counted in optimizer steps here.
        num_training_steps: optimizer steps in all.
        micro_batch_tokens: the most tokens one forward may hold.
        temperature: of the rollouts, so that log-probs are those of the distribution sampled from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        num_training_steps: int,
        micro_batch_tokens: int,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.micro_batch_tokens, self.temperature = model, micro_batch_tokens, temperature
        self.max_grad_norm = optim.max_grad_norm
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.schedule = get_scheduler(optim.lr_scheduler_type, self.optimizer, optim.warmup_steps, num_training_steps)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def _micro_batches(self, trajectories: Sequence[Trajectory], members: Sequence[int]) -> Iterator[list[int]]:
        lengths = [len(trajectories[i].prompt_ids) + len(trajectories[i].response_ids) for i in members]
        for group in micro_batches(lengths, self.micro_batch_tokens):
            yield [members[i] for i in group]

    def infer_batch(
        self, trajectories: Sequence[Trajectory], members: Sequence[int], model: PreTrainedModel | None = None
    ) -> dict[int, torch.Tensor]:
        """Log-probs [T_i] of each member's response, without gradients; of another `model` (a reference) if given."""
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for group in self._micro_batches(trajectories, members):
                scores = response_scores(model or self.model, trajectories, group, self.temperature)
                for row, index in enumerate(group):
                    found[index] = scores.logprobs[row, : len(trajectories[index].response_ids)]
        return found

    def train_batch(
        self,
        trajectories: Sequence[Trajectory],
        members: Sequence[int],
        loss_function: LossFunction,
        observer: Observer | None = None,
    ) -> dict[str, float]:
        """One optimizer step.

        Args:
            trajectories, members: the batch is `trajectories[i]` for i in `members`; it may be empty, then only the
            schedule moves. loss_function: a micro-batch's share of the batch's loss, and metrics (means over its
            tokens). observer: sees each micro-batch's scores and routes; for measuring, it cannot change the step.

        Returns:
            token-weighted means of the metrics, with `loss` (summed over micro-batches), `entropy` and `grad_norm`.
        """
        self.model.train()
        means, total_loss = TokenMeans(), 0.0
        for group in self._micro_batches(trajectories, members):
            with record_routes(self.model, with_gaps=True) as recorded:
                scores = response_scores(self.model, trajectories, group, self.temperature)
            if observer is not None:
                observer(scores, recorded)
            loss, values = loss_function(scores)
            loss.backward()
            total_loss += float(loss.detach())
            means.add({**values, "entropy": float(scores.entropy.mean())}, int(scores.mask.sum()))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()  # without a micro-batch there are no gradients, and it does nothing
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return {"loss": total_loss, "grad_norm": float(norm), **(means.means() if means.tokens else {})}

    def save(self, directory: Path, step: int) -> None:
        """Writes the optimizer's moments (safetensors, by parameter name) and the counters beside the weights."""
        tensors = {
            f"{key}.{name}": self.optimizer.state[parameter][key].contiguous()
            for name, parameter in self.parameters.items()
            if parameter in self.optimizer.state
            for key in ("exp_avg", "exp_avg_sq", "step")
        }
        save_file(tensors, directory / STATE_TENSORS)
        (directory / STATE).write_text(json.dumps({"step": step, "schedule": self.schedule.state_dict()}))

    def load(self, directory: Path) -> int:
        """Restores what `save` wrote; returns the step. The weights are the caller's to load."""
        tensors = load_file(directory / STATE_TENSORS)
        for name, parameter in self.parameters.items():
            if f"step.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{name}"],
                    **{key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
                }
        counters = json.loads((directory / STATE).read_text())
        self.schedule.load_state_dict(counters["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        return counters["step"]
