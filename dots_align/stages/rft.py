"""Rejection-sampling fine-tuning: sample, verify, select, mix, and SFT on what is left.

`<run>/rft/` holds what each part left, and a run that was stopped goes on from there: `samples.jsonl` (a line a prompt,
as of `dots-align generate`), `scores.jsonl`, `selected.jsonl` (SFT data with where each record came from) and
`counts.json`.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dots_align.checkpoint import encode_rollout_prompts, ensure_start
from dots_align.config import DataSection, ModelSection, RftRecipe, recipe_dict
from dots_align.data.chat import as_dicts
from dots_align.data.selection import Answer, Selected, select
from dots_align.data.sources import load_conversations, load_prompts
from dots_align.evals.on_save import resolve_hooks
from dots_align.evals.preference import load_preference_model
from dots_align.generation.command import generate
from dots_align.generation.options import GenerateOptions
from dots_align.generation.output import Output
from dots_align.run_directory import open_run_directory
from dots_align.runtime import barrier, logger, on_main, progress, rank, seed_everything, world_size, write_json
from dots_align.scoring import RewardSum
from dots_align.stages.conversations import train_on
from dots_align.types import Conversation, Message, Prompt, Response

SAMPLES, SCORES, SELECTED, COUNTS = "samples.jsonl", "scores.jsonl", "selected.jsonl", "counts.json"
PROMPTS_AT_ONCE = 64
"""Whose answers are scored together; what a run that dies has to score again."""


def run(recipe: RftRecipe) -> Path:
    """Samples, selects, trains and returns the last checkpoint's directory."""
    prompts = load_prompts(recipe.data, recipe.seed)
    mixed = _conversations_to_mix(recipe)
    resolve_hooks(recipe)  # what is wrong there should not show when all answers are sampled
    run_dir = open_run_directory(recipe)
    seed_everything(recipe.seed)
    directory = run_dir / "rft"
    if not on_main((directory / SELECTED).is_file):
        start = ensure_start(recipe, run_dir)
        encode_rollout_prompts(start, prompts, recipe.rollout.max_tokens)  # or it shows when all others are sampled
        generate(sampling_options(recipe, start), directory / SAMPLES)
        _free_memory()
        _score(recipe, prompts, directory)
        on_main(lambda: _select(recipe, start, prompts, mixed, directory))
    data = DataSection(path=str(directory / SELECTED))
    return train_on(load_conversations(data, recipe.seed), recipe, run_dir)


def sampling_options(recipe: RftRecipe, start: ModelSection) -> GenerateOptions:
    """The recipe's rollouts in the words of `dots-align generate`."""
    keys = recipe.rollout
    return GenerateOptions(
        model=start,
        data=recipe.data,
        parallel=recipe.parallel,
        num_samples=keys.group_size,
        temperature=keys.temperature,
        top_p=keys.top_p,
        top_k=keys.top_k,
        min_p=keys.min_p,
        max_tokens=keys.max_tokens,
        seed=recipe.seed,
        max_num_sequences=keys.max_num_sequences,
        kv_cache_gib=keys.kv_cache_gib,
        token_ids=True,  # which some rewards look at
    )


def _conversations_to_mix(recipe: RftRecipe) -> list[Conversation]:
    """In the order in which they are taken."""
    if recipe.mix is None:
        return []
    found = load_conversations(recipe.mix.data, recipe.seed)
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(recipe.seed)).tolist()]


def _free_memory() -> None:
    """The model that sampled is gone; training needs its room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- verify


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _score(recipe: RftRecipe, prompts: Sequence[Prompt], directory: Path) -> None:
    """Scores what was sampled, every process its share, a line for each prompt."""
    lines = {line["index"]: line for line in _lines(directory / SAMPLES)}
    hashes = [_content_hash(lines[index]) for index in range(len(prompts))]
    # Of the model of a reward there may be as many copies as processes, so it is gone before training begins.
    with contextlib.closing(Output(directory / SCORES, hashes, rank())) as file:
        identity = {"rewards": [recipe_dict(reward) for reward in recipe.rewards]}
        done = on_main(lambda: file.begin(identity, {}, overwrite=False))
        mine = [index for index in range(len(prompts)) if index not in done][rank() :: world_size()]
        with (
            RewardSum(recipe.rewards, recipe.scoring.num_workers, load_preference_model) as rewards,
            progress(len(mine), "score", "prompt") as bar,
            file.writing(),
        ):
            for first in range(0, len(mine), PROMPTS_AT_ONCE):
                indices = mine[first : first + PROMPTS_AT_ONCE]
                for index, line in _scored(indices, lines, prompts, rewards):
                    file.write(index, line)
                bar.update(len(indices))
        barrier()
        on_main(lambda: file.collect(keep_errors=True))
    del rewards
    _free_memory()


def _content_hash(line: dict[str, Any]) -> str:
    """16 hexadecimal digits over a prompt and what was answered to it."""
    content = json.dumps([line["hash"], [sample["text"] for sample in line["samples"]]], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _scored(
    indices: Sequence[int], lines: dict[int, dict[str, Any]], prompts: Sequence[Prompt], rewards: RewardSum
) -> Iterator[tuple[int, dict[str, Any]]]:
    responses = [
        Response(prompts[index], sample["text"], sample["response_ids"], sample["finish_reason"])
        for index in indices
        for sample in lines[index]["samples"]
    ]
    before = rewards.num_errors
    scores = iter(rewards.score(responses))
    errors = rewards.num_errors - before  # of all of them; the first line keeps the number
    for index in indices:
        own = [next(scores) for _ in lines[index]["samples"]]
        found = {"rewards": [total for total, _ in own], "values": [values for _, values in own]}
        yield index, {**found, "errors": errors if index == indices[0] else 0}


# ------------------------------------------------------------------------------------------------------------- select


def _teaches(sample: dict[str, Any]) -> bool:
    """Whether there is something to learn from an answer, if it is right: one that was cut off would be learned with an
    end it never had, one without words is refused as training data.
    """
    return sample["finish_reason"] == "stop" and bool(sample["text"].strip())


def _select(
    recipe: RftRecipe,
    start: ModelSection,
    prompts: Sequence[Prompt],
    mixed: Sequence[Conversation],
    directory: Path,
) -> None:
    """Writes `counts.json` and, last and at once, `selected.jsonl`."""
    lines = {line["index"]: line for line in _lines(directory / SAMPLES)}
    scores = {line["index"]: line for line in _lines(directory / SCORES)}
    answers = [
        Answer(index, number, s["text"], _teaches(s) and reward >= recipe.selection.min_reward)
        for index, line in sorted(lines.items())
        for number, (s, reward) in enumerate(zip(line["samples"], scores[index]["rewards"], strict=True))
    ]
    texts = [json.dumps(as_dicts(prompt.messages), ensure_ascii=False) for prompt in prompts]
    found = select(texts, answers, recipe.selection, recipe.seed)
    if not found.answers:
        raise ValueError(
            f"{directory}: none of {len(answers)} answers is right, there is nothing to learn from; see {SAMPLES} and "
            f"{SCORES}, then change the prompts, rollout.group_size, rollout.max_tokens or selection.min_reward"
        )
    share = list(mixed[: round(recipe.mix.ratio * len(found.answers))]) if recipe.mix else []
    unfinished = sum(sample["finish_reason"] != "stop" for line in lines.values() for sample in line["samples"])
    errors = sum(line["errors"] for line in scores.values())
    counts = {**_counts(found, answers), "unfinished": unfinished, "reward_errors": errors, "mixed": len(share)}
    write_json(directory / COUNTS, counts)
    _tell(counts)
    records = [_record(answer, prompts, scores, found, str(start.path)) for answer in found.answers]
    records += [{"messages": as_dicts(c.messages), "source": c.source, "origin": "mixed"} for c in share]
    temporary = directory / f".{SELECTED}.tmp"
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    os.replace(temporary, directory / SELECTED)


def _record(
    answer: Answer, prompts: Sequence[Prompt], scores: dict[int, dict[str, Any]], found: Selected, checkpoint: str
) -> dict[str, Any]:
    prompt, score = prompts[answer.prompt], scores[answer.prompt]
    return {
        "messages": as_dicts([*prompt.messages, Message("assistant", answer.text)]),
        "source": prompt.source,
        "origin": "sampled",
        "checkpoint": checkpoint,
        "sample": answer.sample,
        "reward": score["rewards"][answer.sample],
        "rewards": score["values"][answer.sample],
        "pass_rate": found.pass_rates[answer.prompt],
    }


def _counts(found: Selected, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "prompts": len(found.pass_rates),
        "prompts_never_right": found.never_right,
        "sampled": len(answers),
        "right": sum(answer.right for answer in answers),
        "duplicates": {"exact": found.exact, "normalised": found.normalised},
        "selected": len(found.answers),
        "bins": [vars(one) for one in found.bins],
    }


def _tell(counts: dict[str, Any]) -> None:
    duplicates = counts["duplicates"]
    logger.info(
        "rft: %d answers to %d prompts, %d right (%d prompts never), %d + %d duplicates; %d selected, %d mixed in",
        counts["sampled"],
        counts["prompts"],
        counts["right"],
        counts["prompts_never_right"],
        duplicates["exact"],
        duplicates["normalised"],
        counts["selected"],
        counts["mixed"],
    )
    for one in counts["bins"]:
        told = one["low"], one["high"], one["prompts"], one["right"], one["kept"]
        logger.info("rft: pass rate %.2f to %.2f: %d prompts, %d right answers, %d kept", *told)
