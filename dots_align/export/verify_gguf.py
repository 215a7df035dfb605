"""Proof that a GGUF file is the checkpoint: llama.cpp in a fresh process gives the checkpoint's answers their odds."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dots_align.checkpoint import load_model, stored_dtype
from dots_align.config import ModelSection
from dots_align.data.chat import as_dicts, encode_prompt, stop_token_ids
from dots_align.export.verify import CONVERSATIONS, TIE_GAP, ask_fresh_process, first_difference, greedy
from dots_align.runtime import device, logger

# Of the median over all prompt tokens of |difference of log-probability|; a trained model is too sure of its own
# answers for a difference to show in them. In F32 only the order of sums differs; the others round weights, and
# llama.cpp then rounds what they are multiplied with to the same format. Measured on random models of the presets tiny
# and small and on a trained tiny one: up to 2e-3, 0.02 and 0.03, and for the K-quants of the random ones 0.05, 0.09 and
# 0.14; a wrong scale, rotary base or lost correction bias moved it by 0.08 to 0.8.
MAX_MEDIAN_LOGPROB_DIFFERENCE = {
    "F32": 1e-4,
    "F16": 0.01,
    "BF16": 0.04,
    "Q8_0": 0.06,
    "Q6_K": 0.1,
    "Q5_K_M": 0.2,
    "Q4_K_M": 0.3,
}
NOT_INSTALLED = "not verified: llama-cpp-python is not installed (pip install 'dots-align[llama]')"
_RELOAD = Path(__file__).with_name("reload_gguf.py")


def verify_gguf(checkpoint: Path, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Asks llama.cpp what it makes of the checkpoint's own greedy answers, in each of the files.

    Args:
        checkpoint: the source, full or adapter; computes in fp32.
        files: GGUF files by their format.

    Returns:
        By format `num_prompts`, `num_identical` (answers that greedy decoding of the file gives, token by token),
        `num_tokens` (of the answers), `num_best` (of them, those that are the likeliest there, too, up to TIE_GAP),
        `median_logprob_difference` (of prompt tokens) and `max_logprob_difference` (of all); or `skipped`, why nothing
        was done.

    Raises:
        ValueError: llama.cpp cannot load a file, renders, reads or ends prompts otherwise, or finds text less (or more)
        likely than the format's rounding explains.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        logger.warning("GGUF %s", NOT_INSTALLED)
        return {format: {"skipped": NOT_INSTALLED} for format in files}
    questions, stops = _answers(checkpoint)
    return {format: _verify(path, format, questions, stops) for format, path in files.items()}


def _answers(checkpoint: Path) -> tuple[list[dict[str, Any]], set[int]]:
    """Greedy answers of the checkpoint, whose model is gone from memory afterwards, and its stop tokens."""
    model, tokenizer = load_model(ModelSection(path=str(checkpoint), dtype=stored_dtype(checkpoint)), device())
    model.float()
    prompt_ids = [encode_prompt(tokenizer, c) for c in CONVERSATIONS]
    samples = greedy(model, tokenizer, prompt_ids)
    questions = []
    for conversation, ids, sample in zip(CONVERSATIONS, prompt_ids, samples, strict=True):
        response_ids = list(sample.response_ids)
        logprobs = _logprobs(model, ids + response_ids)
        question = {"messages": as_dicts(conversation), "prompt_ids": ids, "response_ids": response_ids}
        questions.append({**question, "logprobs": logprobs})
    return questions, set(stop_token_ids(tokenizer))


def _logprobs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    """Of every token but the first."""
    input_ids = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, input_ids[0, 1:, None])[:, 0].tolist()


def _verify(path: Path, format: str, questions: list[dict[str, Any]], stops: set[int]) -> dict[str, Any]:
    request = {"path": str(path.resolve()), "threads": torch.get_num_threads(), "questions": questions}
    found = ask_fresh_process(_RELOAD, request, f"{path}: llama.cpp cannot load and run it")
    if not stops <= set(found["stop_ids"]):
        raise ValueError(f"{path}: llama.cpp does not stop at token ids {sorted(stops - set(found['stop_ids']))}")
    for question, answer in zip(questions, found["answers"], strict=True):
        if question["prompt_ids"] != answer["prompt_ids"]:
            raise ValueError(
                f"{path}: llama.cpp reads the prompt {question['messages'][-1]['content']!r} as other tokens, first at "
                f"position {first_difference(question['prompt_ids'], answer['prompt_ids'])}"
            )
    return _compare(path, format, questions, found["answers"])


def _compare(path: Path, format: str, questions: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    gaps: list[float] = []  # of prompt tokens
    largest = 0.0
    best: list[list[bool]] = []
    for question, answer in zip(questions, answers, strict=True):
        differences = [abs(a - b) for a, b in zip(question["logprobs"], answer["logprobs"], strict=True)]
        start = len(question["prompt_ids"]) - 1
        gaps += differences[:start]
        largest = max(largest, *differences)
        missed = [b - a for a, b in zip(answer["logprobs"], answer["best_logprobs"], strict=True)]
        best.append([gap < TIE_GAP for gap in missed[start:]])
    median, allowed = statistics.median(gaps), MAX_MEDIAN_LOGPROB_DIFFERENCE[format]
    count, total = sum(map(sum, best)), sum(map(len, best))
    if median > allowed or (format == "F32" and count < total):
        raise ValueError(
            f"{path}: is not its checkpoint: log-probabilities of prompts differ by {median:.1e} in llama.cpp (median; "
            f"{allowed:g} is rounding), {total - count} of {total} tokens of greedy answers are not the likeliest; "
            "do not deploy it"
        )
    return {
        "num_prompts": len(questions),
        "num_identical": sum(map(all, best)),
        "num_tokens": total,
        "num_best": count,
        "median_logprob_difference": median,
        "max_logprob_difference": largest,
    }
