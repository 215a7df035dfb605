"""Loads a GGUF file as its users will: llama.cpp, in a process of its own, no dots_align imported.

Run by path (`python -P reload_gguf.py`), never imported. Reads one JSON request from stdin: `path`, `threads` and
`questions`, each with `messages` (a list of {role, content}), `prompt_ids` and `response_ids`. Writes one JSON object
to stdout: `stop_ids` (the tokens that end a turn) and `answers`, for each question `prompt_ids` (its messages, rendered
by the template in the file and read by the tokenizer in it), `logprobs` (of every given token but the first, prompt
and response) and `best_logprobs` (of the likeliest token at each of those positions).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports] - optional: the extra `llama`
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # pyright: ignore[reportMissingImports]


def load(path: str, threads: int, context: int) -> Any:
    """The model with the logits of every position kept, and keys and values in fp32."""
    fp32 = 0  # GGML_TYPE_F32
    return llama_cpp.Llama(
        path,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=fp32,
        type_v=fp32,
        logits_all=True,
        verbose=False,
    )


def rendered_ids(model: Any, messages: list[dict[str, str]]) -> list[int]:
    eos, bos = (model._model.token_get_text(token) for token in (model.token_eos(), model.token_bos()))
    formatter = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], eos, bos)
    prompt = formatter(messages=messages).prompt  # type: ignore[arg-type]
    return model.tokenize(prompt.encode("utf-8"), add_bos=True, special=True)


def answer(model: Any, question: dict[str, Any]) -> dict[str, list[Any]]:
    prompt, response = question["prompt_ids"], question["response_ids"]
    ids = np.array(prompt + response)
    model.reset()
    model.eval(ids[:-1].tolist())
    logits = np.array(model.scores[: len(ids) - 1], np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return {
        "prompt_ids": rendered_ids(model, question["messages"]),
        "logprobs": np.take_along_axis(logprobs, ids[1:, None], axis=1)[:, 0].tolist(),
        "best_logprobs": logprobs.max(axis=1).tolist(),
    }


def main() -> None:
    # Libraries may print: the result has the real stdout to itself.
    stdout, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    questions = request["questions"]
    longest = max(len(q["prompt_ids"]) + len(q["response_ids"]) for q in questions)
    model = load(request["path"], request["threads"], longest)
    vocabulary = model._model.vocab
    stops = [t for t in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, t)]
    result = {"stop_ids": stops, "answers": [answer(model, q) for q in questions]}
    assert not [name for name in sys.modules if name.split(".")[0] == "dots_align"], "dots_align was imported"
    stdout.write(json.dumps(result))
    stdout.flush()  # at exit Python flushes sys.stdout only, which is another stream by now


if __name__ == "__main__":
    main()
