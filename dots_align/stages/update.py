"""The second half of an RL step: from scored trajectories over advantages to optimizer steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from dots_align.config import CriticSection, GrpoRecipe, PpoRecipe, RlTrainSection
from dots_align.model.balance import BalanceLoss, BiasPolicy
from dots_align.model.packed import micro_batches
from dots_align.model.router import RecordedRoutes, flips_of, routes_differ
from dots_align.model.training import CriticEngine, ResponseScores, ResponseValues, Routes, TrainingEngine
from dots_align.objectives.advantages import GROUP_RELATIVE, compute_advantages, zero_variance_groups
from dots_align.objectives.agreement import Agreement
from dots_align.objectives.mismatch import Mismatch
from dots_align.objectives.policy import WHOLE_BATCH, PolicyObjective, kl_controller, kl_estimate
from dots_align.objectives.value import ValueObjective, explained_variance
from dots_align.runtime import gather_objects, world_size
from dots_align.runtime import rank as process_rank
from dots_align.types import Trajectory

RlRecipe = GrpoRecipe | PpoRecipe
Rows = dict[int, torch.Tensor]
"""One number for each response token, [T_i], by the trajectory's index."""


def is_mine(group: int) -> bool:
    """Whether this process samples a group."""
    return group % world_size() == process_rank()


@dataclass
class Batch:
    """What one rollout brings, and what is known about it before the first update.

    `ranks`: of each trajectory the process that trains it; `own`: indices of this process's. `old`, `ref`: log-probs of
    `own` before the update and of the reference, as far as somebody asked for them. `routes`: to replay, or None.
    """

    trajectories: list[Trajectory]
    step: int
    ranks: list[int]
    old: Rows = field(default_factory=dict)
    ref: Rows = field(default_factory=dict)
    routes: Routes | None = None
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @functools.cached_property
    def own(self) -> list[int]:
        return self.mine(range(len(self.trajectories)))

    def mine(self, members: Iterable[int]) -> list[int]:
        return [i for i in members if self.ranks[i] == process_rank()]

    @functools.cached_property
    def groups(self) -> list[int]:
        return [t.group for t in self.trajectories]

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        """[B, T] 1 where a response has a token that the policy sampled, T the longest."""
        rows = [torch.tensor(t.response_mask or [1] * len(t.response_ids)) for t in self.trajectories]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()

    def rollout_logprobs(self, index: int) -> torch.Tensor:
        return torch.tensor(self.trajectories[index].rollout_logprobs)


class PolicyUpdate:
    """Advantages over the whole rollout, then `num_epochs` passes of `num_minibatches` optimizer steps.

    Args:
        reference: the frozen reference policy; needed only where the KL coefficient is not zero, and the policy has no
        adapters that could be switched off instead.
        critic: for PPO; it learns from the same rollout before the policy does.
    """

    def __init__(
        self,
        recipe: RlRecipe,
        engine: TrainingEngine,
        reference: PreTrainedModel | None,
        balance: BalanceLoss | None,
        bias: BiasPolicy,
        critic: CriticUpdate | None = None,
    ) -> None:
        self.recipe, self.engine, self.reference, self.critic = recipe, engine, reference, critic
        self.balance, self.bias = balance, bias
        self.kl = kl_controller(recipe.algorithm)
        self.updates_per_step = recipe.train.num_minibatches * recipe.train.num_epochs
        self.advantages = torch.empty(0)  # [B, T] of the latest rollout

    def __call__(
        self, trajectories: list[Trajectory], step: int, baselines: list[float] | None = None
    ) -> dict[str, float]:
        """One rollout's worth of learning.

        Args:
            trajectories: of all processes; only this process's own need routes. step: for messages and seeds.
            baselines: reward of the greedy answer to each trajectory's prompt, where the estimator wants them.

        Raises:
            MismatchError: the trainer's log-probs are not those of the rollout; nothing was updated.
        """
        batch = self._prepare(trajectories, step)
        metrics = self._advantages(batch, baselines)
        self.advantages = batch.advantages
        if self.critic is None or step >= self.critic.section.warmup_steps:
            metrics |= self._optimize(batch)
        return {**metrics, "learning_rate": self.engine.learning_rate}

    def _prepare(self, trajectories: list[Trajectory], step: int) -> Batch:
        """Log-probs of the policy that sampled and of the reference, and the routes to replay, as far as needed."""
        algorithm, replay = self.recipe.algorithm, self.recipe.router.replay
        ranks = self._ranks(trajectories)
        batch = Batch(handed_over(trajectories, ranks), step, ranks)
        if replay == "R3":
            batch.routes = {i: batch.trajectories[i].routes for i in batch.own}
        # The first minibatch meets the policy that was before the update: log-probs of that forward serve as its old
        # ones, and where there is no other update its routes need no replay.
        several = self.updates_per_step > 1
        of_all = (several and replay == "R2") or algorithm.policy_loss in WHOLE_BATCH or self._kl_in("reward")
        if several or of_all:
            known = set() if of_all else set(split_groups(batch.groups, self.recipe.train.num_minibatches)[0])
            wanted = [i for i in batch.own if i not in known]
            recorded: dict[int, bytes | None] | None = {} if replay == "R2" else None
            batch.old = self.engine.infer_batch(batch.trajectories, wanted, routes=batch.routes, record=recorded)
            batch.routes = batch.routes if recorded is None else recorded
        if self.recipe.algorithm.kl_coef:
            batch.ref = self._reference_logprobs(batch)
        return batch

    def _ranks(self, trajectories: list[Trajectory]) -> list[int]:
        """The process that trains each trajectory: of each minibatch all processes compute about as many tokens."""
        groups = [t.group for t in trajectories]
        silent = (
            set() if self._all_teach else zero_variance_groups(torch.tensor([t.reward for t in trajectories]), groups)
        )
        ranks = [0] * len(trajectories)
        for members in split_groups(groups, self.recipe.train.num_minibatches):
            for index, rank in balanced_ranks(trajectories, members, silent, world_size()).items():
                ranks[index] = rank
        return ranks

    def _kl_in(self, place: str) -> bool:
        return self.recipe.algorithm.kl_coef > 0 and self.recipe.algorithm.kl_in == place

    def _reference_logprobs(self, batch: Batch) -> Rows:
        """Of the reference policy: another model, or this one without its adapters."""
        if self.reference is not None:
            return self.engine.infer_batch(batch.trajectories, batch.own, self.reference)
        policy: Any = self.engine.model
        with policy.disable_adapter():
            return self.engine.infer_batch(batch.trajectories, batch.own)

    def _advantages(self, batch: Batch, baselines: list[float] | None) -> dict[str, float]:
        rewards = torch.tensor([t.reward for t in batch.trajectories])
        penalties, metrics = None, {}
        if self._kl_in("reward"):
            penalties, metrics = self._kl_penalties(batch)
        values = None if self.critic is None else self.critic.values(batch)
        batch.advantages, returns = compute_advantages(
            rewards,
            batch.mask,
            batch.groups,
            self.recipe.algorithm,
            penalties=penalties,
            baselines=None if baselines is None else torch.tensor(baselines),
            values=values,
        )
        if self.critic is not None and values is not None:
            metrics |= self.critic(batch, values, returns)
        return metrics

    def _kl_penalties(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """[B, T] to take off the rewards; moves the controller."""
        old, ref = everyones(batch.old, batch.mask), everyones(batch.ref, batch.mask)
        divergence = kl_estimate(old, ref, self.recipe.algorithm.kl_estimator) * batch.mask
        coefficient = self.kl.value
        mean = float((divergence.sum(-1) / batch.mask.sum(-1)).mean())
        self.kl.update(mean, len(batch.trajectories))
        return coefficient * divergence, {"kl": mean, "kl_coef": coefficient}

    def _optimize(self, batch: Batch) -> dict[str, float]:
        train, groups = self.recipe.train, batch.groups
        silent = zero_variance_groups(torch.tensor([t.reward for t in batch.trajectories]), groups)
        observed = Observed(batch)
        steps = []
        for epoch in range(train.num_epochs):
            for number, members in enumerate(split_groups(groups, train.num_minibatches)):
                first = epoch == 0 and number == 0
                # Without variance there is no gradient, unless something else gives one; the denominators still count
                # such groups.
                learning = [i for i in batch.mine(members) if self._all_teach or groups[i] not in silent]
                self._scale_balance_loss(learning)
                steps.append(
                    self.engine.train_batch(
                        batch.trajectories,
                        learning,
                        self._loss(batch, members, first),
                        observed if first else None,
                        routes=batch.routes,
                        before_step=functools.partial(observed.check, self.recipe) if first else None,
                    )
                )
                self.bias.after_step()
        found = {name: sum(s.get(name, 0.0) for s in steps) / len(steps) for name in steps[0]}
        if self._kl_in("loss") and "kl" in found:
            found["kl_coef"] = self.kl.value
            self.kl.update(found["kl"], len(batch.trajectories))
        return {**found, **observed.metrics(), "zero_variance_groups": float(len(silent))}

    @property
    def _all_teach(self) -> bool:
        """Whether responses of groups without variance may have a gradient too."""
        algorithm = self.recipe.algorithm
        return (
            algorithm.kl_coef > 0
            or algorithm.advantage_estimator not in GROUP_RELATIVE
            or algorithm.policy_loss in WHOLE_BATCH
        )

    def _scale_balance_loss(self, learning: list[int]) -> None:
        if self.balance is not None:
            self.balance.scale = world_size() / max(sum(gather_objects(len(learning))), 1)

    def _loss(self, batch: Batch, members: list[int], first: bool) -> Callable[[ResponseScores], Any]:
        """The loss function of a minibatch, `members` of all processes."""
        tokens = sum(batch.trajectories[i].num_sampled for i in members)
        recipe = self.recipe
        objective = PolicyObjective(
            recipe.algorithm,
            tokens,
            len(members),
            recipe.rollout.max_tokens,
            self.kl.value if self._kl_in("loss") else 0.0,
            recipe.rollout_correction,
        )
        ref = batch.ref if self._kl_in("loss") else {}
        if recipe.algorithm.policy_loss not in WHOLE_BATCH:
            return functools.partial(_loss, objective, batch, ref)
        return self._loss_of_whole_batch(objective, batch, ref, members, first)

    def _loss_of_whole_batch(
        self, objective: PolicyObjective, batch: Batch, ref: Rows, members: list[int], first: bool
    ) -> Callable[[ResponseScores], Any]:
        """For losses with statistics over the minibatch: a forward more gives them, on every process the same."""
        engine, own = self.engine, batch.mine(members)
        now = batch.old if first else engine.infer_batch(batch.trajectories, own, routes=batch.routes)
        mask = batch.mask[members]

        def whole(rows: Rows) -> torch.Tensor | None:
            return everyones({i: rows[i] for i in own}, batch.mask)[members] if rows else None

        sampled = {i: batch.rollout_logprobs(i) for i in own}
        logprobs, old = (everyones({i: rows[i] for i in own}, batch.mask)[members] for rows in (now, batch.old))
        seed = (self.recipe.seed << 32) + batch.step
        found = objective.token_gradients(
            logprobs, old, batch.advantages[members], mask, whole(ref) if ref else None, whole(sampled), seed=seed
        )
        gradients = dict(zip(members, found.gradients, strict=True))
        share = found.loss / float(mask.sum())
        return functools.partial(_linear_loss, gradients, share, found.metrics)


class CriticUpdate:
    """The critic's part of a rollout: values beforehand, then as many optimizer steps as the policy makes."""

    def __init__(self, section: CriticSection, train: RlTrainSection, engine: CriticEngine) -> None:
        self.section, self.train, self.engine = section, train, engine

    def values(self, batch: Batch) -> torch.Tensor:
        """[B, T] of all processes' trajectories."""
        return everyones(self.engine.infer_batch(batch.trajectories, batch.own), batch.mask)

    def __call__(self, batch: Batch, values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
        """Moves values towards returns, both [B, T]; `value_loss` is that of the first optimizer step."""
        steps = []
        for _ in range(self.train.num_epochs):
            for members in split_groups(batch.groups, self.train.num_minibatches):
                tokens = sum(batch.trajectories[i].num_sampled for i in members)
                objective = ValueObjective(self.section.cliprange_value, tokens)
                loss = functools.partial(_value_loss, objective, values, returns)
                steps.append(self.engine.train_batch(batch.trajectories, batch.mine(members), loss))
        found = {name: sum(s[name] for s in steps) / len(steps) for name in ("value", "value_clipfrac")}
        return {
            **found,
            "value_loss": steps[0]["loss"],
            "value_explained": explained_variance(values, returns, batch.mask),
            "critic_grad_norm": sum(s["grad_norm"] for s in steps) / len(steps),
            "critic_learning_rate": self.engine.learning_rate,
        }


def _value_loss(
    objective: ValueObjective, values: torch.Tensor, returns: torch.Tensor, scores: ResponseValues
) -> tuple[torch.Tensor, dict[str, float]]:
    width, device = scores.mask.shape[1], scores.mask.device
    old, wanted = (rows[scores.members, :width].to(device) for rows in (values, returns))
    return objective(scores.values, old, wanted, scores.mask)


def _loss(
    objective: PolicyObjective, batch: Batch, ref: Rows, scores: ResponseScores
) -> tuple[torch.Tensor, dict[str, float]]:
    width, device = scores.mask.shape[1], scores.mask.device
    sampled = None
    if objective.correction is not None:
        sampled = _padded({i: batch.rollout_logprobs(i).to(device) for i in scores.members}, scores)
    return objective(
        scores.logprobs,
        _old(batch, scores),
        batch.advantages[scores.members, :width].to(device),
        scores.mask,
        _padded(ref, scores) if ref else None,
        sampled,
    )


def _old(batch: Batch, scores: ResponseScores) -> torch.Tensor:
    """[b, T] log-probs before the first update; of trajectories nobody has asked about yet those at hand, for good."""
    for row, index in enumerate(scores.members):
        size = len(batch.trajectories[index].response_ids)
        batch.old.setdefault(index, scores.logprobs[row, :size].detach())
    return _padded(batch.old, scores)


def _linear_loss(
    gradients: Rows, share: float, metrics: dict[str, float], scores: ResponseScores
) -> tuple[torch.Tensor, dict[str, float]]:
    """A micro-batch's part of a whole batch's loss: its gradient, and as its value a share by tokens."""
    width, device = scores.mask.shape[1], scores.mask.device
    weights = torch.stack([gradients[i][:width] for i in scores.members]).to(device)
    linear = (scores.logprobs * weights).sum()
    return linear - linear.detach() + share * scores.mask.sum(), metrics


class Observed:
    """Compares the trainer's log-probs and routes with the rollout's, in the forward of the first update."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.agreement, self.mismatch = batch, Agreement(), Mismatch()

    def __call__(self, scores: ResponseScores, recorded: RecordedRoutes) -> None:
        """All members at once, their tokens one after the other: there may be hundreds."""
        members = [self.batch.trajectories[i] for i in scores.members]
        fed = [places[:-1] for places in scores.places]
        rows, device = torch.cat(fed), scores.logprobs.device
        (routes,), (gaps,) = recorded.routes, recorded.gaps
        differ = self._differ(members, routes[rows])
        flips = flips_of(differ, gaps[rows], [len(f) for f in fed])

        def of_responses(of_tokens: torch.Tensor) -> torch.Tensor:
            """From one number for each token fed to those of the states that predicted the responses."""
            parts = of_tokens.split([n for t in members for n in (len(t.prompt_ids) - 1, len(t.response_ids))])
            return torch.cat(parts[1::2])

        sizes = torch.tensor([len(t.response_ids) for t in members], device=device)
        is_response = torch.arange(scores.mask.shape[1], device=device) < sizes[:, None]
        own = scores.mask[is_response].bool()  # an environment's tokens have no log-probs
        sampled = torch.tensor([value for t in members for value in t.rollout_logprobs], device=device)
        differences = (scores.logprobs.detach()[is_response] - sampled)[own]
        affected = of_responses(flips.affected)[own]
        self.agreement.add(differences.abs(), affected, flips.num_roots, flips.root_gap)
        shifted = recorded.shifted[0][rows] if recorded.shifted else differ
        of_each = zip(shifted.split([len(f) for f in fed]), members, strict=True)
        told = [part for part, trajectory in of_each if trajectory.routes is not None]
        self.mismatch.add(differences, torch.cat(told) if told else None)

    @staticmethod
    def _differ(members: Sequence[Trajectory], routes: torch.Tensor) -> torch.Tensor:
        """[tokens fed, layers] where the routes [tokens fed, layers, k] of all members are not the rollout's."""
        # A back end that tells no routes has to answer for every difference.
        same = routes.cpu().numpy().tobytes() if any(t.routes is None for t in members) else b""
        sizes = [(len(t.prompt_ids) + len(t.response_ids) - 1) * routes[0].numel() for t in members]
        ends = itertools.accumulate(sizes)
        theirs = b"".join(
            same[end - size : end] if t.routes is None else t.routes
            for t, size, end in zip(members, sizes, ends, strict=True)
        )
        others = torch.frombuffer(bytearray(theirs), dtype=torch.uint8).view(routes.shape).to(routes.device)
        return routes_differ(routes, others)

    def check(self, recipe: RlRecipe) -> None:
        """Stops the run, on every process, where the recipe's gate says so; collective."""
        self.agreement = Agreement.merged(gather_objects(self.agreement))
        self.mismatch = Mismatch.merged(gather_objects(self.mismatch))
        self.mismatch.check(recipe.mismatch, self.batch.step + 1)

    def metrics(self) -> dict[str, float]:
        return {
            **{f"agreement_{name}": value for name, value in self.agreement.metrics().items()},
            **{f"mismatch_{name}": value for name, value in self.mismatch.metrics().items()},
        }


def everyones(rows: Rows, mask: torch.Tensor) -> torch.Tensor:
    """[B, T] on the host from the rows that each process has; collective. Rows of nobody are 0."""
    found = torch.zeros_like(mask)
    for part in gather_objects({i: row.float().cpu() for i, row in rows.items()}):
        for index, row in part.items():
            found[index, : len(row)] = row
    return found


def balanced_ranks(
    trajectories: Sequence[Trajectory], members: Iterable[int], silent: Collection[int], num_ranks: int
) -> dict[int, int]:
    """Which process trains each of the members: whole groups, so that processes have about as many tokens to compute.
    Groups in `silent` cost nothing.
    """
    of_group: dict[int, list[int]] = {}
    for index in members:
        of_group.setdefault(trajectories[index].group, []).append(index)
    tokens = [
        0
        if group in silent
        else len(trajectories[of[0]].prompt_ids) + sum(len(trajectories[i].response_ids) for i in of)
        for group, of in of_group.items()
    ]
    groups = list(of_group.values())
    shares = micro_batches(tokens, max(sum(tokens), 1), num_ranks)
    return {i: rank for rank, share in enumerate(shares) for number in share for i in groups[number]}


def handed_over(trajectories: list[Trajectory], ranks: Sequence[int]) -> list[Trajectory]:
    """The trajectories, this process's with their routes if it sampled them or not; collective."""
    moved = {
        i: t.routes
        for i, t in enumerate(trajectories)
        if is_mine(t.group) and ranks[i] != process_rank() and t.routes is not None
    }
    found = list(trajectories)
    for part in gather_objects(moved):
        for index, routes in part.items():
            if ranks[index] == process_rank():
                found[index] = replace(found[index], routes=routes)
    return found


def split_groups(groups: Sequence[int], count: int) -> list[list[int]]:
    """Indices of the trajectories of each of `count` minibatches: whole groups, in order, as even as they come."""
    distinct = list(dict.fromkeys(groups))
    batch_of = {group: number * count // len(distinct) for number, group in enumerate(distinct)}
    batches: list[list[int]] = [[] for _ in range(count)]
    for index, group in enumerate(groups):
        batches[batch_of[group]].append(index)
    return [batch for batch in batches if batch]


def _padded(rows: Rows, scores: ResponseScores) -> torch.Tensor:
    """[T_i] tensors of the members of a micro-batch as [b, T], zero where there is no token."""
    width = scores.mask.shape[1]
    return torch.stack([torch.nn.functional.pad(rows[i], (0, width - len(rows[i]))) for i in scores.members])
