"""Sampled answers to prompts, cut off at texts that end them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dots_align.data.chat import stop_token_ids
from dots_align.rollout.engine import LOOK_TOKENS, Failed, RolloutEngine
from dots_align.types import GenerationRequest, Sample, SamplingParams


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
    """
    requests = [_request(tokenizer, ask) for ask in asks]
    windows = [LOOK_TOKENS + max((len(text.encode()) for text in ask.stop), default=0) for ask in asks]

    def is_whole(place: int, ids: list[int]) -> bool:
        stop = asks[place].stop
        # A token is a byte at least: what was not there at the last look lies among the last ones.
        recent = stop and _cut(_text(tokenizer, ids[-windows[place] :]), stop) is not None
        return bool(recent) and _cut(_text(tokenizer, ids), stop) is not None

    found: dict[int, dict[int, Sample]] = {}
    for event in engine.stream(requests, is_whole=is_whole if any(ask.stop for ask in asks) else None):
        if isinstance(event, Failed):
            found.pop(event.request, None)
            yield event.request, event.message
            continue
        samples = found.setdefault(event.request, {})
        samples[event.index] = event.sample
        if len(samples) == requests[event.request].num_samples:
            del found[event.request]
            yield event.request, [_answer(tokenizer, asks[event.request], samples[i]) for i in sorted(samples)]


def _request(tokenizer: Any, ask: Ask) -> GenerationRequest:
    sampling = replace(ask.sampling, stop_token_ids=stop_token_ids(tokenizer))
    return GenerationRequest(ask.prompt_ids, ask.num_samples, sampling)


def _answer(tokenizer: Any, ask: Ask, sample: Sample) -> Answer:
    text = _text(tokenizer, sample.response_ids)
    end = _cut(text, ask.stop)
    finish = sample.finish_reason if end is None else "stop"
    return Answer(text[:end], finish, len(sample.response_ids))


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _cut(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first of the stop texts begins."""
    return min((at for at in map(text.find, stop) if at >= 0), default=None)
