"""The training engine of RL: log-probabilities of responses, optimizer steps over micro-batches, save and load.

Its methods have the names of verl's BaseEngine, and each does what it does there, so that the same code serves there.
Micro-batches are a memory limit: the loss function gets the whole batch's denominators beforehand, so that cutting
the batch changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, get_scheduler

from dots_align.config import OptimSection
from dots_align.model import attention
from dots_align.model.expert_parallel import clip_grad_norm, is_sharded, no_gradient_sync, reshard
from dots_align.model.heads import state_values
from dots_align.model.kept_memory import keep_freed_memory
from dots_align.model.logprobs import model_logprobs
from dots_align.model.optimizer import load_optimizer, make_optimizer, save_optimizer
from dots_align.model.packed import micro_batches, pack_shared
from dots_align.model.router import RecordedRoutes, RouteReplay, idle, moe_layers, record_routes, routes_of
from dots_align.model.sharded_io import as_hub, full_tensor, hub_tensors
from dots_align.runtime import gather_objects, is_main_process, world_size
from dots_align.types import Trajectory

STATE = "training_state.json"


@dataclass(frozen=True)
class ResponseScores:
    """What a forward says about the responses of a micro-batch of b trajectories, whose longest response has T tokens.

    `members` [b] indices of the trajectories; `logprobs` [b, T] (0 where there is no token), `mask` [b, T];
    `entropy` [tokens]; `places` of each one the positions [prompt + response] that its tokens had in the forward, which
    a prompt may share with others.
    """

    members: list[int]
    logprobs: torch.Tensor
    mask: torch.Tensor
    entropy: torch.Tensor
    places: list[torch.Tensor]


@dataclass(frozen=True)
class ResponseValues:
    """What a critic says: `values` [b, T] of the states in which each response token was chosen; else as
    `ResponseScores`.
    """

    members: list[int]
    values: torch.Tensor
    mask: torch.Tensor
    places: list[torch.Tensor]


LossFunction = Callable[[Any], tuple[torch.Tensor, dict[str, float]]]
"""From `ResponseScores` (a critic's: `ResponseValues`) to a micro-batch's share of the loss, and metrics."""
Observer = Callable[[ResponseScores, RecordedRoutes], None]
Routes = Mapping[int, bytes | None]
"""Of trajectories, by index, in the form of `Sample.routes`."""


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


@dataclass(frozen=True)
class _Packed:
    """Trajectories packed for one forward. `places` as in ResponseScores; `positions` [M] of the states that predict
    the M sampled response tokens `targets` [M], trajectory by trajectory; `mask` [b, T] says which of the padded
    responses' places hold one.
    """

    inputs: dict[str, Any]
    places: list[torch.Tensor]
    positions: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each response token, in order, as [b, T]; 0 where there is no token."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def _packed(trajectories: Sequence[Trajectory], shares: Sequence[list[int]], device: torch.device) -> _Packed:
    """Members of a share are responses to one prompt, which is computed once for them."""
    prompts = [trajectories[share[0]].prompt_ids for share in shares]
    responses = [[trajectories[i].response_ids for i in share] for share in shares]
    batch, places = pack_shared(prompts, responses, device)
    rows = [row for of_prompt in places for row in of_prompt]
    # The state before a token predicts it: that of a response's first token is the prompt's last.
    positions = [row[len(p) - 1 : -1] for p, of_prompt in zip(prompts, places, strict=True) for row in of_prompt]
    targets = [row[len(p) :] for p, of_prompt in zip(prompts, places, strict=True) for row in of_prompt]
    members = [trajectories[i] for i in _flat(shares)]
    sampled = [torch.tensor(t.response_mask or [1] * len(t.response_ids)) for t in members]
    mask = torch.nn.utils.rnn.pad_sequence(sampled, batch_first=True).bool().to(device)
    own = torch.cat(sampled).bool().to(device)
    ids = batch.input_ids[0, torch.cat(targets)[own]]
    return _Packed(batch.model_inputs(), rows, torch.cat(positions)[own], ids, mask)


def prompt_shares(
    trajectories: Sequence[Trajectory], members: Sequence[int], routes: Routes | None = None
) -> list[list[int]]:
    """The members in the order in which they come, those together whose group and prompt are the same, and, where
    routes are to be replayed, the routes of the prompt.
    """
    shares: dict[Any, list[int]] = {}
    for index in members:
        trajectory, recorded = trajectories[index], (routes or {}).get(index) or b""
        size = len(trajectory.prompt_ids)
        bytes_per_token = len(recorded) // max(size + len(trajectory.response_ids) - 1, 1)
        key = trajectory.group, tuple(trajectory.prompt_ids), recorded[: size * bytes_per_token]
        shares.setdefault(key, []).append(index)
    return list(shares.values())


def response_scores(
    model: PreTrainedModel, trajectories: Sequence[Trajectory], shares: Sequence[list[int]], temperature: float
) -> ResponseScores:
    """One forward over the packed prompts and responses of `shares` (see `prompt_shares`), prompts computed once for
    each share; log-probs at the sampling temperature.
    """
    packed = _packed(trajectories, shares, next(model.parameters()).device)
    scores = model_logprobs(
        model, packed.inputs, packed.targets, temperature, with_entropy=True, positions=packed.positions
    )
    assert scores.entropy is not None
    logprobs = packed.padded(scores.logprobs)
    return ResponseScores(_flat(shares), logprobs, packed.mask.float(), scores.entropy, packed.places)


def response_values(
    model: PreTrainedModel, trajectories: Sequence[Trajectory], shares: Sequence[list[int]]
) -> ResponseValues:
    """One forward of a critic over the packed prompts and responses of `shares`."""
    packed = _packed(trajectories, shares, next(model.parameters()).device)
    values = state_values(model, packed.inputs, packed.positions)
    return ResponseValues(_flat(shares), packed.padded(values), packed.mask.float(), packed.places)


def _flat(shares: Sequence[list[int]]) -> list[int]:
    return [index for share in shares for index in share]


def _packed_routes(
    model: PreTrainedModel, trajectories: Sequence[Trajectory], shares: Sequence[list[int]], routes: Routes
) -> torch.Tensor:
    """[N, layers, k] to replay in the forward over the packed `shares`."""
    blocks = moe_layers(model)
    parts = []
    for share in shares:
        for index in share:
            recorded, trajectory = routes.get(index), trajectories[index]
            if recorded is None:
                raise ValueError(
                    f"router.replay: the routes of response {index} (to prompt {trajectory.group} of this step) are "
                    "missing; what sampled it did not record them, so use a rollout that does, or router.replay=none"
                )
            num_tokens = len(trajectory.prompt_ids) + len(trajectory.response_ids)
            found = routes_of(recorded, num_tokens, len(blocks), blocks[0][1].top_k)
            parts.append(found if index == share[0] else found[len(trajectory.prompt_ids) :])
    return torch.cat(parts).to(next(model.parameters()).device)


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
        share_prompts: whether a prompt is computed once for all responses to it that are in one forward; that changes
            no log-prob, gradient or expert load. Attention other than our packed one knows no shared prompts: there
            every response has its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        num_training_steps: int,
        micro_batch_tokens: int,
        temperature: float = 1.0,
        offload_optimizer: bool = False,
        share_prompts: bool = True,
    ) -> None:
        if model.device.type == "cpu":
            keep_freed_memory()
        self.share_prompts = share_prompts and model.config._attn_implementation == attention.IMPLEMENTATION
        self.model, self.micro_batch_tokens, self.temperature = model, micro_batch_tokens, temperature
        self.max_grad_norm = optim.max_grad_norm
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.items(), optim, offload_optimizer)
        name, options = optim.schedule
        self.schedule = get_scheduler(name, self.optimizer, optim.warmup_steps, num_training_steps, options)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def _micro_batches(
        self, trajectories: Sequence[Trajectory], members: Sequence[int], routes: Routes | None
    ) -> list[list[list[int]]]:
        """The shares of each forward, forwards of nearly equal size; on every process as many, so that one that has
        fewer tokens makes smaller ones, or empty ones at the end.
        """
        limit = self.micro_batch_tokens
        shares = prompt_shares(trajectories, members, routes) if self.share_prompts else [[i] for i in members]
        shares = [part for share in shares for part in _fitting(trajectories, share, limit)]
        sizes = [_num_tokens(trajectories, share) for share in shares]
        most = max(gather_objects(len(micro_batches(sizes, limit))))
        batches = [[shares[i] for i in group] for group in micro_batches(sizes, limit, most)]
        return batches + [[]] * (most - len(batches))

    def _forward(self, model: PreTrainedModel, trajectories: Sequence[Trajectory], shares: Sequence[list[int]]) -> Any:
        return response_scores(model, trajectories, shares, self.temperature)

    def _per_token(self, scores: Any) -> torch.Tensor:
        """[b, T] what `infer_batch` returns of each token."""
        return scores.logprobs

    def _metrics(self, scores: Any) -> dict[str, float]:
        return {"entropy": float(scores.entropy.mean())}

    def _replayed(
        self, trajectories: Sequence[Trajectory], shares: Sequence[list[int]], routes: Routes | None
    ) -> AbstractContextManager[RouteReplay | None]:
        if routes is None:
            return nullcontext()
        return RouteReplay(self.model, _packed_routes(self.model, trajectories, shares, routes))

    def infer_batch(
        self,
        trajectories: Sequence[Trajectory],
        members: Sequence[int],
        model: PreTrainedModel | None = None,
        *,
        routes: Routes | None = None,
        record: dict[int, bytes | None] | None = None,
        observer: Callable[[Any], None] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Log-probs (a critic's: values) [T_i] of each member's response, without gradients.

        Args:
            model: another one, a reference. routes: to replay. record: gets the routes of every member.
            observer: sees each micro-batch's scores.
        """
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for batch in self._micro_batches(trajectories, members, routes):
                if not batch:
                    self._forward(model or self.model, [_NOTHING], [[0]])
                    continue
                recording = nullcontext() if record is None else record_routes(self.model)
                with self._replayed(trajectories, batch, routes), recording as recorded:
                    scores = self._forward(model or self.model, trajectories, batch)
                if observer is not None:
                    observer(scores)
                if record is not None and recorded is not None:
                    record.update(_split_routes(recorded.take(), scores))
                for row, index in enumerate(scores.members):
                    found[index] = self._per_token(scores)[row, : len(trajectories[index].response_ids)]
        reshard(model or self.model)
        return found

    def train_batch(
        self,
        trajectories: Sequence[Trajectory],
        members: Sequence[int],
        loss_function: LossFunction,
        observer: Observer | None = None,
        *,
        routes: Routes | None = None,
        before_step: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """One optimizer step.

        Args:
            trajectories, members: this process's part of the batch is `trajectories[i]` for i in `members`; if it is
            empty for all processes, only the schedule moves. loss_function: a micro-batch's share of the loss of the
            whole batch, and metrics (means over its tokens). observer: sees each micro-batch's scores and routes; for
            measuring, it cannot change the step. routes: to replay. before_step: called once the gradients are there,
            on every process; what it raises keeps the weights as they are.

        Returns:
            token-weighted means of the metrics, with `loss` (summed over micro-batches), `entropy` and `grad_norm`.
        """
        metrics = self.forward_backward_batch(trajectories, members, loss_function, observer, routes=routes)
        if before_step is not None:
            before_step()
        norm = self.optimizer_step()
        self.lr_scheduler_step()
        return {"grad_norm": norm, **metrics}

    def forward_backward_batch(
        self,
        trajectories: Sequence[Trajectory],
        members: Sequence[int],
        loss_function: LossFunction,
        observer: Observer | None = None,
        *,
        routes: Routes | None = None,
    ) -> dict[str, float]:
        """The gradients of a step, added to those that are there; arguments and metrics as of `train_batch`."""
        self.model.train()
        means, total_loss = TokenMeans(), 0.0
        batches = self._micro_batches(trajectories, members, routes)
        for number, batch in enumerate(batches):
            accumulating = is_sharded(self.model) and number + 1 < len(batches)
            with no_gradient_sync(self.model) if accumulating else nullcontext():
                if not batch:
                    with idle():
                        nothing = self._per_token(self._forward(self.model, [_NOTHING], [[0]])).sum() * 0
                    nothing.backward()
                    continue
                with self._replayed(trajectories, batch, routes) as replay:
                    with record_routes(self.model, with_gaps=True) as recorded:
                        scores = self._forward(self.model, trajectories, batch)
                    if replay is not None:
                        recorded.shifted.append(replay.shifted())
                    if observer is not None:
                        observer(scores, recorded)
                    loss, values = loss_function(scores)
                    (loss * world_size()).backward()  # gradients are averaged over processes
            total_loss += float(loss.detach())
            means.add({**values, **self._metrics(scores)}, int(scores.mask.sum()))
        return _over_processes(total_loss, means)

    def optimizer_zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self) -> float:
        """Clips the gradients, steps and drops them; returns their norm. Without gradients it does nothing."""
        norm = clip_grad_norm(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer_zero_grad()
        return float(norm)

    def lr_scheduler_step(self) -> float:
        """Moves the schedule on by one optimizer step; returns the learning rate of the next one."""
        self.schedule.step()
        return self.learning_rate

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the base model; without adapters it is that anyhow."""
        model: Any = self.model
        return model.disable_adapter() if hasattr(model, "peft_config") else nullcontext()

    def get_per_tensor_param(self) -> tuple[Iterator[tuple[str, torch.Tensor]], None]:
        """Every parameter and persistent buffer, whole, on the host, under its hub name, one at a time.

        Over several processes all have to iterate, in step. The second value is where verl expects an adapter's
        configuration.

        Raises:
            ValueError: the model is under adapters: its weights as they are do not hold what was trained.
        """
        if hasattr(self.model, "peft_config"):
            raise ValueError("the weights of a model under adapters cannot be sent; send those of a merged model")

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            reshard(self.model)
            for name, tensor in hub_tensors(self.model).items():
                yield from as_hub(name, full_tensor(tensor))

        return tensors(), None

    def to(self, device: torch.device | str, model: bool = True, optimizer: bool = True) -> None:
        """Moves the weights (with their gradients), the optimizer's state, or both; what is offloaded stays."""
        if model:
            self.model.to(device)  # pyright: ignore[reportArgumentType] - annotated for a bound self
        if optimizer and not self.optimizer.offload:
            for state in self.optimizer.state.values():
                state.update({name: value.to(device) for name, value in state.items()})

    def save_checkpoint(self, directory: Path, step: int) -> None:
        """Writes the optimizer's state and the counters beside the weights; collective."""
        save_optimizer(self.optimizer, self.parameters, directory)
        if is_main_process():
            (directory / STATE).write_text(json.dumps({"step": step, "schedule": self.schedule.state_dict()}))

    def load_checkpoint(self, directory: Path) -> int:
        """Restores what `save_checkpoint` wrote, on any number of processes; returns the step. The weights are the
        caller's to load.
        """
        load_optimizer(self.optimizer, self.parameters, directory)
        counters = json.loads((directory / STATE).read_text())
        self.schedule.load_state_dict(counters["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        return counters["step"]


class CriticEngine(TrainingEngine):
    """The same for a critic: its model has a value head, `infer_batch` gives values, and losses get
    `ResponseValues`.
    """

    def _forward(self, model: PreTrainedModel, trajectories: Sequence[Trajectory], shares: Sequence[list[int]]) -> Any:
        return response_values(model, trajectories, shares)

    def _per_token(self, scores: Any) -> torch.Tensor:
        return scores.values

    def _metrics(self, scores: Any) -> dict[str, float]:
        return {}


def _num_tokens(trajectories: Sequence[Trajectory], share: list[int]) -> int:
    return len(trajectories[share[0]].prompt_ids) + sum(len(trajectories[i].response_ids) for i in share)


def _fitting(trajectories: Sequence[Trajectory], share: list[int], max_tokens: int) -> list[list[int]]:
    """The share, or where that is too large for a forward parts of it, each of which has the prompt once."""
    if _num_tokens(trajectories, share) <= max_tokens:
        return [share]
    room = max(max_tokens - len(trajectories[share[0]].prompt_ids), 1)
    parts = micro_batches([len(trajectories[i].response_ids) for i in share], room)
    return [[share[i] for i in sorted(part)] for part in parts]


def _split_routes(routes: torch.Tensor, scores: Any) -> dict[int, bytes | None]:
    """Routes [N, layers, k] of a packed forward as those of its members, without each one's last token."""
    routes = routes.cpu()
    return {
        index: routes[places[:-1].cpu()].numpy().tobytes()
        for index, places in zip(scores.members, scores.places, strict=True)
    }


def _over_processes(loss: float, means: TokenMeans) -> dict[str, float]:
    """`loss`, added up, and the token-weighted means over all processes."""
    everyone = TokenMeans()
    parts = gather_objects((loss, means))
    for _, part in parts:
        everyone.add(part.means() if part.tokens else {}, part.tokens)
    return {"loss": sum(loss for loss, _ in parts), **(everyone.means() if everyone.tokens else {})}
