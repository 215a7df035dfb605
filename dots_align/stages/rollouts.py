"""Collecting rollouts: the prompts of a step, their samples, and the scores of these. What has not ended when a step
has enough is kept, and goes on in the next.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dots_align.data.chat import stop_token_ids, token_texts
from dots_align.evals.suite import to_response
from dots_align.objectives.advantages import overlong_penalty, zero_variance_groups
from dots_align.rollout.backend import RolloutBackend
from dots_align.rollout.engine import Failed, RolloutEngine
from dots_align.rollout.episodes import Episodes
from dots_align.rollout.scheduler import Finished
from dots_align.runtime import gather_objects
from dots_align.runtime import rank as process_rank
from dots_align.scoring import RewardSum, Score, Scoring
from dots_align.stages.update import RlRecipe, is_mine
from dots_align.types import Episode, GenerationRequest, Prompt, Sample, SamplingParams, Trajectory

NUM_SAMPLES_LOGGED = 8


class PromptSampler:
    """Prompts in an order that depends on the seed and the position alone, so a resumed run goes on where it
    stopped.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed

    def draw(self, start: int, count: int) -> list[tuple[int, int]]:
        """(position, prompt index) of `count` prompts from position `start` on, counted from 0; every epoch sees each
        prompt once.
        """
        positions = range(start, start + count)
        return [(p, self._order(p // self.num_prompts)[p % self.num_prompts]) for p in positions]

    @functools.cache  # noqa: B019 - one sampler lives as long as its run
    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.num_prompts))
        random.Random(f"prompts-{self.seed}-{epoch}").shuffle(order)
        return order


@dataclass(frozen=True)
class Rollouts:
    """What one step sampled and learns from: trajectories in the order of prompts, the rewards of the greedy answers
    to their prompts where there are any, and what the logs say about all that was sampled: `metrics`, and `samples`,
    each with its place among the trajectories (None: dropped by dynamic sampling).
    """

    trajectories: list[Trajectory]
    baselines: list[float] | None
    metrics: dict[str, float]
    samples: list[tuple[int | None, dict[str, Any]]]


@dataclass(frozen=True)
class Scored:
    """A trajectory with the sum and the value of each reward function, what the samples file shows of it (of one in
    each group), and the reward of the greedy answer to its prompt, where the algorithm wants that.

    The trajectory's own reward is what teaches: the sum, less what an overlong response loses. `policies` as of
    `Member`.
    """

    trajectory: Trajectory
    reward: float
    rewards: dict[str, float]
    finish_reason: str
    policies: tuple[tuple[int, int], ...]
    shown: dict[str, Any] | None = None
    episode: tuple[int, bool] | None = None
    """With an environment: how often the policy spoke, and whether the environment failed."""
    baseline: float | None = None

    def without_routes(self) -> Scored:
        return replace(self, trajectory=replace(self.trajectory, routes=None))


@dataclass(frozen=True)
class Member:
    """A sample as far as it has got; its score once it has ended and all of its step are there.

    `policies` says who sampled its tokens, in order: (steps that policy had trained for, number of tokens).
    """

    sample: Sample
    policies: tuple[tuple[int, int], ...] = ()
    score: Score | None = None

    @property
    def ended(self) -> bool:
        return self.sample.finish_reason != "abort"


@dataclass(frozen=True)
class Group:
    """A prompt in work: its position in the order of prompts, its index, and how many steps the policy had trained for
    when it began. `members` are known to the process that samples them (`is_mine` of the position), `ended` to all.
    """

    position: int
    index: int
    since: int
    members: tuple[Member, ...] = ()
    ended: bool = False


class Collector:
    """Rollouts of one step after the other, by a back end that has the weights they should be sampled with.

    Args:
        prompt_ids: the prompts' tokens.

    Attributes:
        position: of the next prompt to draw.
        groups: prompts in work that no step has had yet, in the order of positions.
    """

    def __init__(
        self,
        recipe: RlRecipe,
        engine: RolloutBackend,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        prompt_ids: list[list[int]],
        rewards: RewardSum,
    ) -> None:
        self.recipe, self.engine, self.tokenizer = recipe, engine, tokenizer
        self.prompts, self.prompt_ids, self.rewards = prompts, prompt_ids, rewards
        self.sampler = PromptSampler(len(prompts), recipe.seed)
        self.episodes = None
        if recipe.environment is not None and isinstance(engine, RolloutEngine):
            self.episodes = Episodes(engine, tokenizer, recipe.environment)
        self.position = 0
        self.groups: list[Group] = []
        self._step = self._version = 0
        self._sampling_seconds = self._waiting_seconds = 0.0

    def collect(self, step: int, version: int) -> Rollouts:
        """Samples a group of responses to each prompt of a step, and scores them; collective.

        With dynamic sampling, groups whose rewards are all equal make room for those of other prompts, up to
        `max_refill_rounds` times; what is still missing then is missing. If none is left, all are kept.

        Args:
            step: that will train on it. version: steps that the policy which samples has trained for.
        """
        self._step, self._version = step, version
        self._sampling_seconds = self._waiting_seconds = 0.0
        started, busy = time.monotonic(), self.rewards.busy_seconds
        wanted, rounds = self.recipe.train.num_prompts_per_step, self.recipe.algorithm.max_refill_rounds
        everything, errors = self._sample(wanted)
        kept, used = informative(everything) if rounds else everything, 0
        while used < rounds and (missing := wanted - num_groups(kept)):
            fresh, more_errors = self._sample(missing)
            everything, errors, used = everything + fresh, errors + more_errors, used + 1
            kept += informative(fresh)
        kept = kept or everything
        metrics = self._metrics(everything) | self._staleness(kept) | {"reward_errors": float(errors)}
        if rounds:
            dropped = num_groups(everything) - num_groups(kept)
            metrics |= {"refill_rounds": float(used), "dropped_groups": float(dropped)}
        metrics |= {
            "rollout_seconds": time.monotonic() - started,
            "sampling_seconds": self._sampling_seconds,
            "score_seconds": self._waiting_seconds,
            "score_busy_seconds": self.rewards.busy_seconds - busy,
        }
        baselines = [s.baseline for s in kept if s.baseline is not None]
        # One sample of several prompts says more than several of one.
        places = {id(s): place for place, s in enumerate(kept)}
        shown = [(places.get(id(s)), s.shown) for s in everything if s.shown is not None]
        return Rollouts([s.trajectory for s in kept], baselines or None, metrics, shown[:NUM_SAMPLES_LOGGED])

    def _metrics(self, scored: list[Scored]) -> dict[str, float]:
        count = len(scored)
        found = {
            "reward": sum(s.reward for s in scored) / count,
            **{f"reward_{name}": sum(s.rewards[name] for s in scored) / count for name in scored[0].rewards},
            "response_length": sum(s.trajectory.num_sampled for s in scored) / count,
            "stop_rate": sum(s.finish_reason == "stop" for s in scored) / count,
        }
        # Correct as in an evaluation: the first reward function gives at least 1.
        verdicts = [next(iter(s.rewards.values())) >= 1 for s in scored]
        for name, verdict in (("correct", True), ("wrong", False)):
            sizes = [s.trajectory.num_sampled for s, v in zip(scored, verdicts, strict=True) if v == verdict]
            if sizes:
                found[f"response_length_{name}"] = sum(sizes) / len(sizes)
        if self.recipe.algorithm.overlong_buffer:
            found["overlong_penalty"] = sum(s.reward - s.trajectory.reward for s in scored) / count
        if episodes := [s.episode for s in scored if s.episode is not None]:
            found["turns"] = sum(turns for turns, _ in episodes) / count
            found["environment_errors"] = float(sum(failed for _, failed in episodes))
        if scored[0].baseline is not None:
            found["greedy_reward"] = sum(s.baseline or 0.0 for s in scored) / count
        return found

    def _staleness(self, scored: list[Scored]) -> dict[str, float]:
        """By how many steps the policies that sampled are behind the one that trains, over tokens."""
        if not self.recipe.samples_ahead:
            return {}
        ages = [(self._step - version, count) for s in scored for version, count in s.policies]
        total = sum(count for _, count in ages)
        found = {
            "staleness": sum(age * count for age, count in ages) / total,
            "staleness_max": float(max(age for age, _ in ages)),
        }
        if self.recipe.rollout.partial is not None:
            found["groups_carried"] = float(len(self.groups))
        return found

    # ------------------------------------------------------------------------------------------------------- sampling

    def _sample(self, count: int) -> tuple[list[Scored], int]:
        """The next `count` prompts that are done, or a few more where some must not wait; every process its share, and
        all get to know what all have sampled (but for the routes).

        Returns:
            the samples in the order of prompts, and the number of failed rewards.
        """
        self._begin(count)
        errors_before, scoring, added = self.rewards.num_errors, self.rewards.begin(), []
        started = time.monotonic()
        taken: list[Group] | None = None
        while taken is None:
            added += self._advance(scoring)
            taken = self._ready(count)
        sampled = time.monotonic()
        self._keep_scores(added, scoring.results())
        self._sampling_seconds += sampled - started
        self._waiting_seconds += time.monotonic() - sampled
        positions = {group.position for group in taken}
        own = [s for g in self.groups if g.position in positions for s in self._scored(g)]
        self.groups = [g for g in self.groups if g.position not in positions]
        if self.recipe.algorithm.advantage_estimator == "remax":
            own = self._with_baselines([g for g in taken if is_mine(g.position)], own)
        errors = self.rewards.num_errors - errors_before
        theirs = gather_objects(([scored.without_routes() for scored in own], errors))
        everyone = [s for rank, (part, _) in enumerate(theirs) for s in (own if rank == process_rank() else part)]
        everyone.sort(key=lambda s: s.trajectory.group)  # stable: the samples of a group stay in order
        return everyone, sum(errors for _, errors in theirs)

    def _begin(self, count: int) -> None:
        """Draws prompts, so that `count` are in work, and what partial rollouts want beyond that."""
        partial = self.recipe.rollout.partial
        missing = max(count + (partial.extra_prompts if partial else 0) - len(self.groups), 0)
        drawn = self.sampler.draw(self.position, missing)
        self.position += missing
        self.groups += [Group(position, index, self._version) for position, index in drawn]

    def _advance(self, scoring: Scoring) -> list[tuple[int, int]]:
        """Takes every sample of this process to its end, or on by as many tokens as partial rollouts allow; those that
        end are in work with the scoring processes while the others go on.

        Returns:
            (position, number in its group) of those that have ended, as they were added to `scoring`.
        """
        mine = [g for g in self.groups if is_mine(g.position) and not g.ended]
        found = {g.position: dict(enumerate(g.members)) for g in mine}
        added, failed = [], []
        for event in self._stream(mine):
            if isinstance(event, Failed):
                failed.append(event.message)
                continue
            group, number = mine[event.request], event.index
            before = found[group.position].get(number)
            if before is not None and before.ended:
                continue
            member = found[group.position][number] = self._member(before, event.sample)
            if member.ended:
                scoring.add([to_response(self.tokenizer, self.prompts[group.index], member.sample)])
                added.append((group.position, number))
        if failed:
            raise ValueError("\n".join(failed))
        of_group = {position: tuple(members[n] for n in sorted(members)) for position, members in found.items()}
        ended = [p for p, members in of_group.items() if all(m.ended for m in members)]
        everyones = {position for part in gather_objects(ended) for position in part}
        self.groups = [
            replace(g, members=of_group.get(g.position, g.members), ended=g.ended or g.position in everyones)
            for g in self.groups
        ]
        return added

    def _stream(self, groups: list[Group]) -> Iterator[Finished | Failed]:
        requests, routes = [self._request(g) for g in groups], self.recipe.rollout.backend == "local"
        if self.episodes is None:
            return self.engine.stream(requests, return_routes=routes)
        return self.episodes.stream(requests, [self.prompts[g.index] for g in groups], return_routes=routes)

    def _member(self, before: Member | None, sample: Sample) -> Member:
        if self.recipe.rollout.partial and self._has_room(sample):
            sample = replace(sample, finish_reason="abort")  # at the end of its round, not of its tokens
        policies = () if before is None else before.policies
        new = len(sample.response_ids) - sum(count for _, count in policies)
        return Member(sample, (*policies, (self._version, new)))

    def _has_room(self, sample: Sample) -> bool:
        """Whether a sample only ended because its round did."""
        return sample.finish_reason == "length" and len(sample.response_ids) < self.recipe.rollout.max_tokens

    def _ready(self, count: int) -> list[Group] | None:
        """The groups that the step takes: those that have waited longest; None if there are not enough yet."""
        done = [g for g in self.groups if g.ended]
        partial = self.recipe.rollout.partial
        due = [g for g in self.groups if partial and self._step - g.since >= partial.max_staleness]
        if len(done) < count or not all(g.ended for g in due):
            return None
        return done[: max(count, len(due))]

    def _keep_scores(self, added: list[tuple[int, int]], scores: list[Score]) -> None:
        found = dict(zip(added, scores, strict=True))

        def scored(group: Group) -> tuple[Member, ...]:
            return tuple(replace(m, score=found.get((group.position, n), m.score)) for n, m in enumerate(group.members))

        self.groups = [replace(g, members=scored(g)) for g in self.groups]

    def _request(self, group: Group) -> GenerationRequest:
        keys = self.recipe.rollout
        # Samples of a group begin together, and what has not ended has made use of all its rounds.
        so_far = max((len(m.sample.response_ids) for m in group.members if not m.ended), default=0)
        limit = min(so_far + keys.partial.chunk_tokens, keys.max_tokens) if keys.partial else keys.max_tokens
        sampling = SamplingParams(
            temperature=keys.temperature,
            top_p=keys.top_p,
            top_k=keys.top_k,
            min_p=keys.min_p,
            max_tokens=limit,
            stop_token_ids=stop_token_ids(self.tokenizer),
            seed=(self.recipe.seed << 40) + group.position,
        )
        started = tuple(m.sample for m in group.members)
        return GenerationRequest(self.prompt_ids[group.index], keys.group_size, sampling, started)

    # -------------------------------------------------------------------------------------------------------- scoring

    def _scored(self, group: Group) -> list[Scored]:
        """What the process that sampled a group tells of it."""
        return [self._with_score(group, number, member) for number, member in enumerate(group.members)]

    def _with_score(self, group: Group, number: int, member: Member) -> Scored:
        assert member.score is not None
        reward, values = member.score
        sample, recipe, episode = member.sample, self.recipe, member.sample.episode
        prompt_ids, mask = self.prompt_ids[group.index], None
        if episode is not None and recipe.environment is not None:
            reward = reward + recipe.environment.weight * episode.reward
            values = {**values, "environment": episode.reward}
            prompt_ids, mask = episode.prompt_ids, episode.own
        taught = reward + overlong_penalty(len(sample.response_ids), recipe.rollout.max_tokens, recipe.algorithm)
        trajectory = Trajectory(
            prompt_ids, sample.response_ids, sample.rollout_logprobs, group.position, taught, sample.routes, mask
        )
        shown = self._shown(group, sample, reward, values) if number == 0 else None
        return Scored(trajectory, reward, values, sample.finish_reason, member.policies, shown, episode=_brief(episode))

    def _shown(self, group: Group, sample: Sample, reward: float, values: dict[str, float]) -> dict[str, Any]:
        response = to_response(self.tokenizer, self.prompts[group.index], sample)
        return {
            "prompt": response.prompt.messages[-1].content,
            "response": response.text if sample.episode is None else self._dialogue(sample),
            "answer": response.prompt.answer,
            "reward": reward,
            "rewards": values,
            "finish_reason": response.finish_reason,
            "tokens": token_texts(self.tokenizer, sample.response_ids),
            "logprobs": [round(value, 4) for value in sample.rollout_logprobs],
        }

    def _dialogue(self, sample: Sample) -> str:
        """All of an episode, with the marks of its turns."""
        text = self.tokenizer.decode(sample.response_ids)
        assert isinstance(text, str)
        return text

    def _with_baselines(self, mine: list[Group], own: list[Scored]) -> list[Scored]:
        """The same samples with the reward of the greedy answer to their prompt."""
        requests = [self._request(replace(group, members=())) for group in mine]
        max_tokens = self.recipe.rollout.max_tokens
        greedy = [
            replace(r, num_samples=1, sampling=replace(r.sampling, temperature=0.0, max_tokens=max_tokens))
            for r in requests
        ]
        answers = self.engine.generate(greedy)
        responses = [
            to_response(self.tokenizer, self.prompts[group.index], answer)
            for group, (answer,) in zip(mine, answers, strict=True)
        ]
        rewards = {g.position: reward for g, (reward, _) in zip(mine, self.rewards.score(responses), strict=True)}
        return [replace(s, baseline=rewards[s.trajectory.group]) for s in own]


def _brief(episode: Episode | None) -> tuple[int, bool] | None:
    return None if episode is None else (episode.num_turns, episode.error)


def informative(scored: list[Scored]) -> list[Scored]:
    """Those of groups whose rewards are not all equal."""
    silent = zero_variance_groups(torch.tensor([s.reward for s in scored]), [s.trajectory.group for s in scored])
    return [s for s in scored if s.trajectory.group not in silent]


def num_groups(scored: list[Scored]) -> int:
    return len({s.trajectory.group for s in scored})
