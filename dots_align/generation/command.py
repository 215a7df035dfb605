"""`dots-align generate`: prompts in, a line of samples for each out, as they are done; killed, it goes on."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dots_align.checkpoint import check_parallel, check_whole, fingerprint, load_trainable, stored_dtype
from dots_align.data.chat import as_dicts, encode_prompt, stop_token_ids
from dots_align.data.sources import load_prompts
from dots_align.generation.bulk import BulkSampler
from dots_align.generation.options import GenerateOptions
from dots_align.generation.output import Output
from dots_align.rollout.engine import RolloutEngine
from dots_align.runtime import (
    gather_objects,
    logger,
    on_main,
    progress,
    rank,
    start_processes,
    world_size,
)
from dots_align.types import GenerationRequest, Prompt, Sample, SamplingParams

PROBABILITY_DIGITS = 7  # a log-probability is fp32, and reproducible to about 1e-6


def generate(options: GenerateOptions, output: Path) -> None:
    """Samples every prompt that `output` has no line of yet. Of several processes each takes its share.

    Raises:
        ValueError: bad input, before anything is sampled; or, when all others are done, some prompts could not be.
    """
    check_whole(str(options.model.path))
    check_parallel(options)
    prompts = _load(options, output)
    hashes = [_hash(prompt) for prompt in prompts]
    if world_size() > 1:
        start_processes(options.parallel.timeout_minutes)
    with contextlib.closing(Output(output, hashes, rank())) as file:
        done = on_main(lambda: file.begin(*_identity(options, hashes), options.overwrite))
        if done:
            logger.info("%d of %d prompts are done already", len(done), len(prompts))
        failed: list[str] = []
        if len(done) < len(prompts):
            mine = [index for index in range(len(prompts)) if index not in done][rank() :: world_size()]
            failed = _sample(options, prompts, mine, file)
        failures = [message for part in gather_objects(failed) for message in part]
        on_main(lambda: _end(file, len(prompts), failures))


def _load(options: GenerateOptions, output: Path) -> list[Prompt]:
    if output.exists() and Path(options.data.path).exists() and output.samefile(options.data.path):
        raise ValueError(f"{output}: this is the file of the prompts; choose another one to write")
    return load_prompts(options.data, options.seed, need_answer=False)


def _hash(prompt: Prompt) -> str:
    """16 hexadecimal digits over what the model is asked and the answer that goes with it."""
    content = json.dumps([as_dicts(prompt.messages), prompt.answer], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _identity(options: GenerateOptions, hashes: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What has to be equal for a file to be continued, and where it came from."""
    checkpoint = Path(str(options.model.path)).resolve()
    identity = {
        **options.identity(),
        "dtype": _dtype(options),
        "checkpoint": fingerprint(checkpoint),
        "prompts": f"{len(hashes)}, {hashlib.sha256(''.join(hashes).encode()).hexdigest()[:16]}",
    }
    return identity, {"checkpoint": str(checkpoint), "prompts": options.data.path}


def _dtype(options: GenerateOptions) -> Any:
    """What the weights are stored in, unless told otherwise."""
    given = "dtype" in options.model.model_fields_set
    return options.model.dtype if given else stored_dtype(Path(str(options.model.path)))


def _sample(options: GenerateOptions, prompts: Sequence[Prompt], mine: Sequence[int], file: Output) -> list[str]:
    """Samples prompts `mine` and writes their lines; returns what went wrong, a message a prompt."""
    section = options.model.model_copy(update={"dtype": _dtype(options)})
    model, tokenizer = load_trainable(section, options.parallel, bf16=False)
    budget = None if options.kv_cache_gib is None else int(options.kv_cache_gib * 2**30)
    engine = RolloutEngine(model, options.max_num_sequences, budget)
    lines = Lines(options, prompts, tokenizer)
    started, unit = time.monotonic(), "sample"
    failed: dict[int, str] = {}
    with progress(len(mine) * options.num_samples, "generate", unit) as bar, file.writing():
        sampler = BulkSampler(engine, options.routes)
        for index, found in sampler.run(lines.requests(mine)):
            if isinstance(found, str):
                failed[index] = f"{prompts[index].source}: {found}"
            file.write(index, lines.line(index, found))
            bar.set_postfix_str(f"{_rate(engine, started):,.0f} tokens/s", refresh=False)
            bar.update(options.num_samples)
    tokens = sum(gather_objects(engine.stats.num_sampled_tokens))
    seconds = time.monotonic() - started
    logger.info("sampled %s tokens in %.1f s (%s tokens/s)", f"{tokens:,}", seconds, f"{tokens / seconds:,.0f}")
    return [failed[index] for index in sorted(failed)]


def _rate(engine: RolloutEngine, started: float) -> float:
    return engine.stats.num_sampled_tokens / (time.monotonic() - started)


def _end(file: Output, num_prompts: int, failures: list[str]) -> None:
    if world_size() > 1:
        file.collect(keep_errors=True)
    if failures:
        raise ValueError(
            f"{file.path}: {len(failures)} of {num_prompts} prompts could not be done and have an `error` in place of "
            f"samples; the first is {failures[0]}"
        )


class Lines:
    """What becomes of a prompt: a request to the engine, and then a line of the output."""

    def __init__(self, options: GenerateOptions, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.prompts, self.tokenizer = options, prompts, tokenizer
        self.stops = stop_token_ids(tokenizer)
        self.ids: dict[int, list[int]] = {}

    def requests(self, indices: Sequence[int]) -> Iterator[tuple[int, GenerationRequest | str]]:
        """A request a prompt, or why there can be none."""
        for index in indices:
            try:
                self.ids[index] = encode_prompt(self.tokenizer, self.prompts[index].messages)
            except jinja2.TemplateError as error:
                yield index, f"the chat template refuses it: {error}"
                continue
            yield index, GenerationRequest(self.ids[index], self.options.num_samples, self._sampling(index))

    def _sampling(self, index: int) -> SamplingParams:
        keys = self.options
        # Every prompt has random numbers of its own; a sample's depend on nothing but seed, prompt and position.
        seed = (keys.seed << 40) + index
        filters = {"top_p": keys.top_p, "top_k": keys.top_k, "min_p": keys.min_p}
        return SamplingParams(
            keys.temperature, **filters, max_tokens=keys.max_tokens, stop_token_ids=self.stops, seed=seed
        )

    def line(self, index: int, found: list[Sample] | str) -> dict[str, Any]:
        """All of a line but for index and hash."""
        prompt, ids = self.prompts[index], self.ids.pop(index, [])
        line: dict[str, Any] = {"source": prompt.source, "messages": as_dicts(prompt.messages)}
        if prompt.answer is not None:
            line["answer"] = prompt.answer
        line["num_prompt_tokens"] = len(ids)
        if isinstance(found, str):
            return {**line, "error": found}
        if self.options.keeps_ids:
            line["prompt_ids"] = ids
        return {**line, "samples": [self._sample(sample) for sample in found]}

    def _sample(self, sample: Sample) -> dict[str, Any]:
        text = self.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        found = {"text": text, "finish_reason": sample.finish_reason, "num_tokens": len(sample.response_ids)}
        if self.options.keeps_ids:
            found["response_ids"] = sample.response_ids
        if self.options.logprobs:
            found["logprobs"] = [round(x, PROBABILITY_DIGITS) for x in sample.logprobs]
            found["rollout_logprobs"] = [round(x, PROBABILITY_DIGITS) for x in sample.rollout_logprobs]
        if self.options.routes:
            found["routes"] = base64.b64encode(sample.routes or b"").decode()
        return found
