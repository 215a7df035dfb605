"""Greedy evaluation on held-out prompts: exact match, stop rate, mean length."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dots_align.config import DataSection, EvaluationSection, RewardSection
from dots_align.data.chat import stop_token_ids
from dots_align.data.encoding import encode_prompts
from dots_align.data.sources import data_hash, load_prompts
from dots_align.model.expert_parallel import is_sharded
from dots_align.rollout.engine import RolloutEngine
from dots_align.runtime import gather_objects, progress, rank, world_size
from dots_align.scoring import RewardSum
from dots_align.types import GenerationRequest, Prompt, Response, Sample, SamplingParams

Record = TypeVar("Record")
METRICS = ("exact_match", "stop_rate", "mean_length")
_KEY = re.compile(r"\bdata\.(path|\w+_field)\b")


def held_out(
    load: Callable[[DataSection, int], list[Record]], data: DataSection, count: int, seed: int
) -> list[Record]:
    """The first `count` records of an evaluation. What `load` has against them names keys as a recipe has them."""
    if data.path.startswith("synthetic:"):
        data = data.model_copy(update={"max_samples": data.max_samples or count})
    try:
        return load(data, seed)[:count]
    except ValueError as error:
        raise ValueError(_KEY.sub(r"evaluation.data.\1", str(error))) from None


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation: EvaluationSection, seed: int
) -> dict[str, Any]:
    """Answers the prompts greedily and scores them. Of a sharded model every process answers its share and gets the
    whole result.

    Returns:
        the content of `eval.json`: `metrics` (`exact_match`: share of prompts the scorer gave at least 1;
        `stop_rate`: share that ended their turn; `mean_length`: response tokens), what was asked, and the first
        samples.
    """
    prompts = held_out(load_prompts, evaluation.data, evaluation.num_prompts, seed)
    stride = world_size() if is_sharded(model) else 1
    own = _answer(model, tokenizer, evaluation, prompts[rank() if stride > 1 else 0 :: stride])
    parts = gather_objects(own) if stride > 1 else [own]
    responses = [parts[i % stride][i // stride] for i in range(len(prompts))]
    with RewardSum([RewardSection(function=evaluation.scorer)]) as scorer:
        scores = [score for score, _ in scorer.score(responses)]
    count = len(prompts)
    return {
        "metrics": {
            "exact_match": sum(score >= 1 for score in scores) / count,
            "stop_rate": sum(r.finish_reason == "stop" for r in responses) / count,
            "mean_length": sum(len(r.response_ids) for r in responses) / count,
        },
        "num_prompts": count,
        "num_scorer_errors": scorer.num_errors,
        "data": evaluation.data.path,
        "data_hash": data_hash(prompts),
        "scorer": evaluation.scorer,
        "samples": [
            _shown(response, score)
            for response, score in zip(responses[: evaluation.num_samples_shown], scores, strict=False)
        ],
    }


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation: EvaluationSection, prompts: list[Prompt]
) -> list[Response]:
    encoded = encode_prompts(
        tokenizer,
        [(p.messages, p.source) for p in prompts],
        model.config.max_position_embeddings,
        evaluation.max_tokens,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=evaluation.max_tokens, stop_token_ids=stop_token_ids(tokenizer)
    )
    with progress(len(prompts), "evaluate", "answers") as bar:
        samples = RolloutEngine(model).generate(
            [GenerationRequest(ids, 1, sampling) for ids in encoded], on_finished=bar.update
        )
    return [to_response(tokenizer, prompt, group[0]) for prompt, group in zip(prompts, samples, strict=True)]


def to_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sample: Sample) -> Response:
    """What a reward function gets to see of a sample."""
    if (episode := sample.episode) is not None:
        ids = [token for token, own in zip(sample.response_ids, episode.own, strict=True) if own]
        last = next(turn.content for turn in reversed(episode.turns) if turn.role == "assistant")
        return Response(prompt, last, ids, sample.finish_reason, episode.turns)
    text = tokenizer.decode(sample.response_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return Response(prompt, text, sample.response_ids, sample.finish_reason)


def _shown(response: Response, score: float) -> dict[str, Any]:
    return {
        "prompt": response.prompt.messages[-1].content,
        "response": response.text,
        "answer": response.prompt.answer,
        "score": score,
        "finish_reason": response.finish_reason,
    }
