"""Sampled answers to prompts, cut off at texts that end them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dots_align.data.chat import stop_token_ids
from dots_align.model.expert_parallel import is_sharded
from dots_align.rollout.engine import Failed, RolloutEngine
from dots_align.types import GenerationRequest, Sample, SamplingParams

FIRST_LOOK = 32  # tokens after which an answer is looked at for texts that end it; each next look is twice as far


@dataclass(frozen=True)
class Answer:
    """`text` has no special tokens; `finish_reason` is `stop` or `length`."""

    text: str
    finish_reason: str
    num_tokens: int


@dataclass(frozen=True)
class Ask:
    """`num_samples` answers to one prompt, each ended by the end of the turn, or before any of `stop`."""

    prompt_ids: list[int]
    sampling: SamplingParams
    num_samples: int = 1
    stop: tuple[str, ...] = ()


def answers(engine: RolloutEngine, tokenizer: Any, asks: Sequence[Ask]) -> Iterator[tuple[int, list[Answer] | str]]:
    """Gives (place, its answers, or why there are none) as they are done. Over several processes all take part, with
    asks of their own or none, and read to the end.

    The engine knows tokens, not texts: answers that a text may end are sampled in parts, and looked at between them.
    """
    open_asks = {place: [] for place in range(len(asks))}
    looked = FIRST_LOOK if any(ask.stop for ask in asks) or is_sharded(engine.model) else 1 << 30
    most = max((ask.sampling.max_tokens for ask in asks), default=0)
    while _busy(engine, bool(open_asks)):
        places = list(open_asks)
        requests = [_request(tokenizer, asks[place], open_asks[place], looked) for place in places]
        for number, samples in _grouped(engine, requests):
            place = places[number]
            ask = asks[place]
            if isinstance(samples, str):
                del open_asks[place]
                yield place, samples
                continue
            going_on = [_unfinished(tokenizer, ask, sample, looked) for sample in samples]
            if any(going_on):
                open_asks[place] = [
                    replace(sample, finish_reason="abort") if goes else sample
                    for sample, goes in zip(samples, going_on, strict=True)
                ]
            else:
                del open_asks[place]
                yield place, [_answer(tokenizer, ask, sample) for sample in samples]
        looked = min(2 * looked, max(most, looked))


def _busy(engine: RolloutEngine, busy: bool) -> bool:
    if not is_sharded(engine.model):
        return busy
    from dots_align.runtime import gather_objects

    return any(gather_objects(busy))


def _request(tokenizer: Any, ask: Ask, started: list[Sample], looked: int) -> GenerationRequest:
    max_tokens = min(looked, ask.sampling.max_tokens) if ask.stop else ask.sampling.max_tokens
    sampling = replace(ask.sampling, max_tokens=max_tokens, stop_token_ids=stop_token_ids(tokenizer))
    return GenerationRequest(ask.prompt_ids, ask.num_samples, sampling, tuple(started))


def _grouped(engine: RolloutEngine, requests: list[GenerationRequest]) -> Iterator[tuple[int, list[Sample] | str]]:
    """The samples of each request when the last of them is there."""
    found: dict[int, dict[int, Sample]] = {}
    for event in engine.stream(requests):
        if isinstance(event, Failed):
            found.pop(event.request, None)
            yield event.request, event.message
            continue
        samples = found.setdefault(event.request, {})
        samples[event.index] = event.sample
        if len(samples) == requests[event.request].num_samples:
            del found[event.request]
            yield event.request, [samples[i] for i in sorted(samples)]


def _unfinished(tokenizer: Any, ask: Ask, sample: Sample, looked: int) -> bool:
    if not ask.stop or sample.finish_reason == "stop" or looked >= ask.sampling.max_tokens:
        return False
    return _cut(_text(tokenizer, sample), ask.stop) is None


def _answer(tokenizer: Any, ask: Ask, sample: Sample) -> Answer:
    text = _text(tokenizer, sample)
    end = _cut(text, ask.stop)
    finish = sample.finish_reason if end is None else "stop"
    return Answer(text[:end], finish, len(sample.response_ids))


def _text(tokenizer: Any, sample: Sample) -> str:
    return str(tokenizer.decode(sample.response_ids, skip_special_tokens=True))


def _cut(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first of the stop texts begins."""
    return min((at for at in map(text.find, stop) if at >= 0), default=None)
