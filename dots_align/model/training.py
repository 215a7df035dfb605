"""The training engine of RL: log-probabilities of responses, optimizer steps over micro-batches, save and load.

Shaped like verl's BaseEngine (infer batch, train batch, save, load), so that the same code can serve there.
Micro-batches are a memory limit: the loss function gets the whole batch's denominators beforehand, so that cutting
the batch changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, get_scheduler

from dots_align.config import OptimSection
from dots_align.model.expert_parallel import clip_grad_norm, is_sharded, no_gradient_sync, reshard
from dots_align.model.logprobs import IGNORED, model_logprobs
from dots_align.model.optimizer import load_optimizer, make_optimizer, save_optimizer
from dots_align.model.packed import micro_batches, pack
from dots_align.model.router import RecordedRoutes, idle, record_routes
from dots_align.runtime import gather_objects, is_main_process, world_size
from dots_align.types import Trajectory

STATE = "training_state.json"


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
    boundaries = batch.cu_seq_lens.tolist()
    sizes = [len(t.response_ids) for t in chosen]
    targets = batch.input_ids.new_full(batch.input_ids.shape, IGNORED)
    for start, trajectory, size in zip(boundaries, chosen, sizes, strict=False):
        # The state before a token predicts it, so a response is read one position early.
        first = start + len(trajectory.prompt_ids) - 1
        targets[0, first : first + size] = batch.input_ids[0, first + 1 : first + size + 1]
    scores = model_logprobs(model, batch.model_inputs(), targets, temperature, with_entropy=True)
    assert scores.entropy is not None
    mask = torch.arange(max(sizes), device=device)[None] < torch.tensor(sizes, device=device)[:, None]
    logprobs = scores.logprobs.new_zeros(mask.shape).masked_scatter(mask, scores.logprobs)
    return ResponseScores(members, logprobs, mask.float(), scores.entropy, boundaries)


# What a process computes, for nothing, while others still have a micro-batch: a sharded forward is everybody's.
_NOTHING = Trajectory(prompt_ids=[0], response_ids=[0], rollout_logprobs=[0.0], group=-1, reward=0.0)


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
        offload_optimizer: bool = False,
    ) -> None:
        self.model, self.micro_batch_tokens, self.temperature = model, micro_batch_tokens, temperature
        self.max_grad_norm = optim.max_grad_norm
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.items(), optim, offload_optimizer)
        self.schedule = get_scheduler(optim.lr_scheduler_type, self.optimizer, optim.warmup_steps, num_training_steps)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def _micro_batches(self, trajectories: Sequence[Trajectory], members: Sequence[int]) -> list[list[int]]:
        """The members of each forward; empty ones at the end where other processes have more forwards to do."""
        lengths = [len(trajectories[i].prompt_ids) + len(trajectories[i].response_ids) for i in members]
        batches = [[members[i] for i in group] for group in micro_batches(lengths, self.micro_batch_tokens)]
        most = max(gather_objects(len(batches)))
        return batches + [[]] * (most - len(batches))

    def infer_batch(
        self, trajectories: Sequence[Trajectory], members: Sequence[int], model: PreTrainedModel | None = None
    ) -> dict[int, torch.Tensor]:
        """Log-probs [T_i] of each member's response, without gradients; of another `model` (a reference) if given."""
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for batch in self._micro_batches(trajectories, members):
                if not batch:
                    response_scores(model or self.model, [_NOTHING], [0], self.temperature)
                    continue
                scores = response_scores(model or self.model, trajectories, batch, self.temperature)
                for row, index in enumerate(batch):
                    found[index] = scores.logprobs[row, : len(trajectories[index].response_ids)]
        reshard(model or self.model)
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
            trajectories, members: this process's part of the batch is `trajectories[i]` for i in `members`; if it is
            empty for all processes, only the schedule moves. loss_function: a micro-batch's share of the loss of the
            whole batch, and metrics (means over its tokens). observer: sees each micro-batch's scores and routes; for
            measuring, it cannot change the step.

        Returns:
            token-weighted means of the metrics, with `loss` (summed over micro-batches), `entropy` and `grad_norm`.
        """
        self.model.train()
        means, total_loss = TokenMeans(), 0.0
        batches = self._micro_batches(trajectories, members)
        for number, batch in enumerate(batches):
            accumulating = is_sharded(self.model) and number + 1 < len(batches)
            with no_gradient_sync(self.model) if accumulating else nullcontext():
                if not batch:
                    with idle():
                        nothing = response_scores(self.model, [_NOTHING], [0], self.temperature).logprobs.sum() * 0
                    nothing.backward()
                    continue
                with record_routes(self.model, with_gaps=True) as recorded:
                    scores = response_scores(self.model, trajectories, batch, self.temperature)
                if observer is not None:
                    observer(scores, recorded)
                loss, values = loss_function(scores)
                (loss * world_size()).backward()  # gradients are averaged over processes
            total_loss += float(loss.detach())
            means.add({**values, "entropy": float(scores.entropy.mean())}, int(scores.mask.sum()))
        norm = clip_grad_norm(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()  # without a micro-batch there are no gradients, and it does nothing
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return {"grad_norm": float(norm), **_over_processes(total_loss, means)}

    def save(self, directory: Path, step: int) -> None:
        """Writes the optimizer's state and the counters beside the weights; collective."""
        save_optimizer(self.optimizer, self.parameters, directory)
        if is_main_process():
            (directory / STATE).write_text(json.dumps({"step": step, "schedule": self.schedule.state_dict()}))

    def load(self, directory: Path) -> int:
        """Restores what `save` wrote, on any number of processes; returns the step. The weights are the caller's to
        load.
        """
        load_optimizer(self.optimizer, self.parameters, directory)
        counters = json.loads((directory / STATE).read_text())
        self.schedule.load_state_dict(counters["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        return counters["step"]


def _over_processes(loss: float, means: TokenMeans) -> dict[str, float]:
    """`loss`, added up, and the token-weighted means over all processes."""
    everyone = TokenMeans()
    parts = gather_objects((loss, means))
    for _, part in parts:
        everyone.add(part.means() if part.tokens else {}, part.tokens)
    return {"loss": sum(loss for loss, _ in parts), **(everyone.means() if everyone.tokens else {})}
