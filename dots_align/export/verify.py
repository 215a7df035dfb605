"""Proof that an exported directory is the checkpoint: plain transformers in a fresh process says the same tokens.

Both sides compute in fp32 whatever the weights are stored in, so that only a real difference or a near-tie shows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dots_align.checkpoint import check_whole, load_model, stored_dtype
from dots_align.config import ModelSection
from dots_align.data.chat import as_dicts, encode_prompt, stop_token_ids
from dots_align.rollout.engine import RolloutEngine
from dots_align.runtime import device
from dots_align.types import GenerationRequest, Message, Sample, SamplingParams

MAX_TOKENS = 32
# Two logits closer than this may change places between two correct implementations in fp32.
TIE_GAP = 1e-4
# Of the median over all tokens (about 1e-6): a near-tie between two experts may move a few tokens by 0.05.
MAX_MEDIAN_LOGPROB_DIFFERENCE = 1e-4
_RELOAD = Path(__file__).with_name("reload.py")
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "What is 17 plus 25?"),),
    (Message("user", "小明有32个苹果，又买了9个，现在有几个？"),),
    (Message("user", "Anna has 41 coins and spends 13 of them. How many coins are left?"),),
    (Message("user", "用一句话介绍一下你自己。"),),
    (
        Message("system", "你是一个严谨的助手。 Answer briefly."),
        Message("user", "What is 8 minus 3?"),
        Message("assistant", "8-3: 8-3=5. \\boxed{5}"),
        Message("user", "那么 12 加 30 等于多少？"),
    ),
)


def verify_export(
    checkpoint: Path, exported: Path, prompts: Sequence[str] | None = None, base: Path | None = None
) -> dict[str, Any]:
    """Compares greedy answers of the export (by plain transformers) with the checkpoint's (by the rollout engine).

    Args:
        checkpoint: the source, full or adapter.
        exported: the directory to prove.
        prompts: user messages to ask; a few Chinese and English conversations if not given.
        base: the full checkpoint that `exported` is an adapter on, if it is one.

    Returns:
        `num_prompts`, `num_identical` (all tokens equal), `num_tokens` (compared), `median_logprob_difference`,
        `max_logprob_difference`, `ties` (differences where the two best logits were less than TIE_GAP apart: rounding,
        not an error) and `first_disagreement` (the first of them, or None).

    Raises:
        ValueError: the directory cannot be loaded without guessing, or renders, stops or answers differently.
    """
    checkpoint, exported = Path(checkpoint), Path(exported)
    check_whole(checkpoint)
    if base is None and not (exported / "config.json").is_file():
        raise ValueError(f"{exported}: not an exported directory: it has no config.json")
    conversations = [[Message("user", p)] for p in prompts] if prompts else [list(c) for c in CONVERSATIONS]
    # The fresh process first: its model is gone from memory before the checkpoint's is loaded.
    reloaded = _reload(exported, conversations, base)
    model, tokenizer = load_model(ModelSection(path=str(checkpoint), dtype=stored_dtype(checkpoint)), device())
    model.float()
    _check_stops(exported, reloaded, tokenizer)
    prompt_ids = [encode_prompt(tokenizer, c) for c in conversations]
    for conversation, ids, answer in zip(conversations, prompt_ids, reloaded["answers"], strict=True):
        if ids != answer["prompt_ids"]:
            raise ValueError(
                f"{exported}: the prompt {conversation[-1].content!r} is rendered to other tokens than in "
                f"{checkpoint}, first at position {first_difference(ids, answer['prompt_ids'])}; "
                "the tokenizer or the chat template changed"
            )
    samples = greedy(model, tokenizer, prompt_ids)
    return _compare(model, exported, conversations, prompt_ids, samples, reloaded["answers"])


def _reload(exported: Path, conversations: list[list[Message]], base: Path | None = None) -> dict[str, Any]:
    """Answers of the exported directory from a fresh process; see reload.py."""
    request = {
        "directory": str(exported.resolve()),
        "base": None if base is None else str(base.resolve()),
        "device": str(device()),
        "max_tokens": MAX_TOKENS,
        "conversations": [as_dicts(c) for c in conversations],
    }
    result = ask_fresh_process(_RELOAD, request, f"{exported}: plain transformers cannot load and run it")
    if result["problems"]:
        more = f" and {len(result['problems']) - 1} more" if len(result["problems"]) > 1 else ""
        raise ValueError(
            f"{exported}: plain transformers reports {result['problems'][0]}{more}; the weights are not whole"
        )
    return result


def ask_fresh_process(
    script: Path, request: dict[str, Any], failure: str, python: str = sys.executable
) -> dict[str, Any]:
    """Runs a script that reads JSON and, last of all, writes JSON, by this interpreter or that of another environment;
    ValueError, which begins with `failure`, if it ends without. How it ends once it has answered says nothing about
    the answer: what a library does when its interpreter is taken down may abort it.
    """
    try:
        done = subprocess.run(
            # -P keeps the script's own folder, and with it the modules beside it, off the import path.
            [python, "-P", str(script)],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, **_ENVIRONMENT},
            check=False,
        )
    except OSError as error:  # an interpreter that is none
        raise ValueError(f"{failure}: {error}") from None
    try:
        return json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(f"{failure}: {lines[-1].strip()}") from None


def _check_stops(exported: Path, reloaded: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that seldom ends its turn would not show that its stop tokens were lost; the configuration does."""
    expected, found = set(stop_token_ids(tokenizer)), set(reloaded["eos_token_ids"])
    if expected != found:
        raise ValueError(
            f"{exported}: generation_config.json stops at token ids {sorted(found, key=str)}, "
            f"the checkpoint's tokenizer at {sorted(expected)}"
        )
    if reloaded["pad_token_id"] != tokenizer.pad_token_id:
        raise ValueError(
            f"{exported}: generation_config.json pads with {reloaded['pad_token_id']}, "
            f"the tokenizer with {tokenizer.pad_token_id}"
        )


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]]) -> list[Sample]:
    """The rollout engine's greedy answer to each prompt, of at most MAX_TOKENS tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop_token_ids=stop_token_ids(tokenizer))
    groups = RolloutEngine(model).generate([GenerationRequest(ids, 1, sampling) for ids in prompt_ids])
    return [group[0] for group in groups]


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Index of the first difference between unequal sequences; the shorter length if one is a prefix of the other."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _compare(
    model: PreTrainedModel,
    exported: Path,
    conversations: list[list[Message]],
    prompt_ids: list[list[int]],
    samples: list[Sample],
    answers: list[dict[str, Any]],
) -> dict[str, Any]:
    """Raises ValueError for the first real disagreement; near-ties are collected."""
    ties: list[dict[str, Any]] = []
    gaps: list[float] = []
    for conversation, prompt, sample, answer in zip(conversations, prompt_ids, samples, answers, strict=True):
        ours, theirs = sample.response_ids, answer["response_ids"]
        agreed = len(ours) if ours == theirs else first_difference(ours, theirs)
        gaps += [abs(a - b) for a, b in zip(sample.logprobs[:agreed], answer["logprobs"][:agreed], strict=True)]
        if ours == theirs:
            continue
        difference = {
            "prompt": conversation[-1].content,
            "position": agreed,
            "checkpoint": ours[agreed] if agreed < len(ours) else None,
            "exported": theirs[agreed] if agreed < len(theirs) else None,
        }
        if not _is_tie(model, prompt + theirs[:agreed], difference):
            raise ValueError(_disagreement(exported, difference))
        ties.append(difference)
    median = statistics.median(gaps) if gaps else 0.0
    if median > MAX_MEDIAN_LOGPROB_DIFFERENCE:
        raise ValueError(
            f"{exported}: answers with the checkpoint's tokens, but their log-probabilities differ by {median:.1e} "
            f"(median), beyond {MAX_MEDIAN_LOGPROB_DIFFERENCE}; the weights or the configuration changed"
        )
    return {
        "num_prompts": len(conversations),
        "num_identical": len(conversations) - len(ties),
        "num_tokens": len(gaps),
        "median_logprob_difference": median,
        "max_logprob_difference": max(gaps, default=0.0),
        "ties": ties,
        "first_disagreement": ties[0] if ties else None,
    }


def _is_tie(model: PreTrainedModel, input_ids: list[int], difference: dict[str, Any]) -> bool:
    """Whether the exported token, too, is a best one of the checkpoint, up to rounding, after `input_ids`."""
    if difference["checkpoint"] is None or difference["exported"] is None:
        return False
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([input_ids], device=model.device), use_cache=False).logits[0, -1].float()
    best, exported = logits.max(), logits[difference["exported"]]
    return bool(best - exported < TIE_GAP)


def _disagreement(exported: Path, difference: dict[str, Any]) -> str:
    def said(token: int | None) -> str:
        return "the end" if token is None else f"token {token}"

    return (
        f"{exported}: does not answer like its checkpoint: prompt {difference['prompt']!r}, response position "
        f"{difference['position']}: {said(difference['exported'])} instead of {said(difference['checkpoint'])}; "
        "do not deploy it"
    )
