"""Samples that talk with an environment: several turns, tools. Token in, token out: what was sampled stays as it is,
and what an environment says is put behind it as the chat template would.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dots_align.config import EnvironmentSection
from dots_align.data.chat import encode_following, encode_prompt
from dots_align.model.expert_parallel import is_sharded
from dots_align.rollout.engine import Failed, RolloutEngine
from dots_align.rollout.scheduler import Finished
from dots_align.runtime import logger
from dots_align.scoring import load_function
from dots_align.types import Episode, GenerationRequest, Message, Observation, Prompt, Response, Sample

_ENDED = Sample([], [], [], "stop")  # stands for those samples of a group that a request is not about


@dataclass
class _Live:
    """An episode that goes on: sample `index` of request `place`; `sample` has all tokens so far."""

    place: int
    index: int
    request: GenerationRequest
    prompt: Prompt
    environment: Any
    sample: Sample = _ENDED
    own: list[int] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    num_turns: int = 0
    reward: float = 0.0
    error: bool = False

    def finished(self) -> Finished:
        turns = tuple(self.turns)
        episode = Episode(self.request.prompt_ids, self.own, turns, self.num_turns, self.reward, self.error)
        return Finished(self.place, self.index, replace(self.sample, episode=episode))

    def continued(self) -> GenerationRequest:
        """A request for this sample alone, with the random numbers that it has in its group."""
        others = (_ENDED,) * self.index
        return replace(self.request, num_samples=self.index + 1, started=(*others, self.sample))


class Episodes:
    """Runs samples through an environment each, on an engine that nobody else uses meanwhile. Every sample goes on by
    itself: while one waits for its environment, the engine decodes the others.

    An environment that raises, or takes longer than its time, ends its episode there; the first is logged, and all are
    told with their sample (`Episode.error`).

    Raises:
        ValueError: there is no such environment.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, section: EnvironmentSection) -> None:
        self.engine, self.tokenizer, self.section = engine, tokenizer, section
        self._factory = load_function(section.factory, "environment.factory")
        self._reported = False

    def stream(
        self, requests: list[GenerationRequest], prompts: list[Prompt], return_routes: bool = False
    ) -> Iterator[Finished | Failed]:
        """As `RolloutEngine.stream`, of requests that answer `prompts`; a request's `max_tokens` are those of a whole
        episode. Samples come with their `episode`.
        """
        engine, sharded = self.engine, is_sharded(self.engine.model)
        calls = Calls(self.section.max_concurrency, self.section.timeout_seconds)
        live: dict[int, dict[int, _Live]] = {}  # by number of the engine's request, then by sample
        try:
            with engine.session():
                for place, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                    group = self._begin(place, request, prompt)
                    if (refusal := engine.refusal(group[0].request)) is not None:
                        yield Failed(place, f"{prompt.source}: {refusal}")
                        continue
                    live[engine.submit(group[0].request, return_routes)] = {e.index: e for e in group}
                while engine.anyone_has_work(besides=calls.waiting > 0):
                    for episode, answer in calls.done(wait=not engine.has_work):
                        if self._goes_on(episode, answer):
                            live[engine.submit(episode.continued(), return_routes)] = {episode.index: episode}
                        else:
                            yield episode.finished()
                    if engine.has_work or sharded:
                        yield from self._step(live, calls)
        finally:
            for number in live:
                engine.abort(number)
            if not engine.has_work:
                engine.sleep()

    def _begin(self, place: int, request: GenerationRequest, prompt: Prompt) -> list[_Live]:
        """The episodes of a group. What the first one's environment shows in the prompt's place, all of them read."""
        environments: list[Any] = []
        shown: list[list[Message] | None] = []
        for _ in range(request.num_samples):
            environments.append(None)
            shown.append(None)
            try:
                made = self._factory(**self.section.arguments)
                shown[-1] = made.reset(prompt)
                environments[-1] = made
            except Exception as error:  # noqa: BLE001 - an environment is the user's code; the run goes on
                self._report(prompt, error)
        if shown[0] is not None:
            request = replace(request, prompt_ids=encode_prompt(self.tokenizer, shown[0]))
        return [_Live(place, n, request, prompt, made, error=made is None) for n, made in enumerate(environments)]

    def _step(self, live: dict[int, dict[int, _Live]], calls: Calls) -> Iterator[Finished | Failed]:
        """One step of the engine; turns that it ends go to their environments."""
        for event in self.engine.step():
            group = live[event.request]
            if isinstance(event, Failed):
                episode = next(iter(group.values()))
                yield Failed(episode.place, f"{episode.prompt.source}: {event.message}")
                continue
            episode = group.get(event.index)
            if episode is None:  # of those that were only named
                continue
            response = self._turn(episode, event.sample)
            if episode.environment is None:
                yield episode.finished()
            else:
                calls.start(episode, lambda e=episode, r=response: e.environment.step(r))

    def _turn(self, episode: _Live, sample: Sample) -> Response:
        """Takes what the policy has sampled since the environment spoke."""
        new = sample.response_ids[len(episode.own) :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        assert isinstance(text, str)
        episode.sample = sample
        episode.own += [1] * len(new)
        episode.turns.append(Message("assistant", text))
        episode.num_turns += 1
        return Response(episode.prompt, text, new, sample.finish_reason, tuple(episode.turns))

    def _goes_on(self, episode: _Live, answer: Any) -> bool:
        """Takes what an environment has said, and whether the policy has another turn."""
        if isinstance(answer, Exception):
            self._report(episode.prompt, answer)
            episode.error = True
            return False
        episode.reward += answer.reward
        sample = episode.sample
        # Behind another stop token, or in the middle of a turn, nobody else can speak.
        ended_turn = sample.finish_reason == "stop" and sample.response_ids[-1] == self.tokenizer.eos_token_id
        if answer.done or not answer.messages or not ended_turn or episode.num_turns >= self.section.max_turns:
            return False
        said = encode_following(self.tokenizer, answer.messages)
        if len(sample.response_ids) + len(said) >= episode.request.sampling.max_tokens:
            episode.sample = replace(sample, finish_reason="length")
            return False
        silence = [0.0] * len(said)
        episode.sample = replace(
            sample,
            response_ids=sample.response_ids + said,
            rollout_logprobs=sample.rollout_logprobs + silence,
            logprobs=sample.logprobs + silence,
            finish_reason="abort",
        )
        episode.own += [0] * len(said)
        episode.turns += answer.messages
        return True

    def _report(self, prompt: Prompt, error: Exception) -> None:
        if not self._reported:
            self._reported = True
            logger.error(
                "environment %s failed on %s (%s: %s); the episode ends there, further failures are only counted",
                self.section.factory,
                prompt.source,
                type(error).__name__,
                error,
                exc_info=error,
            )


class Calls:
    """Calls of the user's code in threads, `at_once` of them. One that takes longer than `seconds` is given up: its
    thread cannot be ended, but nobody waits for it, and another takes its place.
    """

    def __init__(self, at_once: int, seconds: float) -> None:
        self._at_once, self._seconds = at_once, seconds
        self._in_line: deque[tuple[_Live, Callable[[], Any]]] = deque()
        self._running: dict[int, tuple[_Live, float]] = {}  # by number of the call, until when
        self._answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._count = 0

    @property
    def waiting(self) -> int:
        return len(self._in_line) + len(self._running)

    def start(self, episode: _Live, call: Callable[[], Any]) -> None:
        self._in_line.append((episode, call))
        self._fill()

    def done(self, wait: bool) -> list[tuple[_Live, Observation | Exception]]:
        """What has been answered since the last time; with `wait`, if anything is in work, after a moment for it."""
        found: list[tuple[_Live, Any]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                number, answer = self._answers.get(timeout=0.01 if wait and self._running and not found else 0)
                if number in self._running:  # not given up
                    found.append((self._running.pop(number)[0], answer))
        now = time.monotonic()
        for number, (episode, until) in list(self._running.items()):
            if now > until:
                del self._running[number]
                found.append((episode, TimeoutError(f"took longer than {self._seconds:g} s")))
        self._fill()
        return found

    def _fill(self) -> None:
        while self._in_line and len(self._running) < self._at_once:
            episode, call = self._in_line.popleft()
            self._count += 1
            self._running[self._count] = episode, time.monotonic() + self._seconds
            threading.Thread(target=self._call, args=(self._count, call), name="environment", daemon=True).start()

    def _call(self, number: int, call: Callable[[], Any]) -> None:
        try:
            answer = call()
            if not isinstance(answer, Observation):
                raise TypeError(f"step returned {type(answer).__name__}, not a dots_align.types.Observation")
        except Exception as error:  # noqa: BLE001 - an environment is the user's code; the run goes on
            answer = error
        self._answers.put((number, answer))
