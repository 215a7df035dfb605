"""Runs a GGUF file as its users will: llama.cpp, in a process of its own, no dots_align imported.

Run by path (`python -P fresh_llama.py`), never imported. Reads and writes what fresh_transformers.py does, with `path`
and `threads` in place of `directory` and `device`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports] - optional: the extra `llama`
import numpy as np
from llama_cpp import llama_cpp as binding  # pyright: ignore[reportMissingImports]
from llama_cpp._ggml import libggml  # pyright: ignore[reportMissingImports]
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # pyright: ignore[reportMissingImports]

RANKING = "ffn_moe_argsort-"  # [tokens, experts] int32: every token's experts from its first choice on


class Routes:
    """Collects the experts' ranking of every MoE layer while llama.cpp computes."""

    def __init__(self) -> None:
        self.layers: dict[int, bytes] = {}
        libggml.ggml_get_name.restype, libggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        libggml.ggml_nbytes.restype, libggml.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        libggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self.callback = binding.ggml_backend_sched_eval_callback(self._seen)  # kept alive as long as this is

    def _seen(self, tensor: Any, asking: bool, _data: Any) -> bool:
        name = libggml.ggml_get_name(tensor).decode()
        wanted = name.startswith(RANKING)
        if wanted and not asking:
            content = ctypes.create_string_buffer(libggml.ggml_nbytes(tensor))
            libggml.ggml_backend_tensor_get(tensor, content, 0, len(content))
            layer = int(name.removeprefix(RANKING))
            self.layers[layer] = self.layers.get(layer, b"") + content.raw
        return wanted if asking else True

    def take(self, experts: int, chosen: int) -> np.ndarray | None:
        """[T, layers, k] uint8 of the evaluation since the last call, or None if llama.cpp named no such tensor."""
        found = [np.frombuffer(self.layers[n], np.int32).reshape(-1, experts)[:, :chosen] for n in sorted(self.layers)]
        self.layers.clear()
        return np.stack(found, 1).astype(np.uint8) if found else None


def load(path: str, threads: int, context: int, routes: Routes) -> Any:
    """The model with the logits of every position kept, and keys and values in fp32."""
    defaults = binding.llama_context_default_params

    def watched() -> Any:  # the binding's class has no argument for it
        parameters = defaults()
        parameters.cb_eval = routes.callback
        return parameters

    binding.llama_context_default_params = watched
    fp32 = 0  # GGML_TYPE_F32
    return llama_cpp.Llama(
        path,
        n_ctx=context,
        n_batch=context,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=fp32,
        type_v=fp32,
        logits_all=True,
        verbose=False,
    )


def rendered(model: Any, question: dict[str, Any]) -> list[int] | None:
    text = question.get("text")
    if question.get("messages"):
        eos, bos = (model._model.token_get_text(token) for token in (model.token_eos(), model.token_bos()))
        formatter = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], eos, bos)
        text = formatter(messages=question["messages"]).prompt
    return None if text is None else model.tokenize(text.encode("utf-8"), add_bos=True, special=True)


def stops(model: Any, ids: list[int], end: int, certain: float) -> bool:
    """Whether a completion ends where the end of the turn is certain."""
    answer = model.create_completion(ids, max_tokens=3, temperature=0.0, logit_bias={str(end): certain})
    return answer["choices"][0]["finish_reason"] == "stop"


def main() -> None:
    # Libraries may print: the result has the real stdout to itself.
    stdout, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    questions, arrays, routes = request["questions"], {}, Routes()
    model = load(request["path"], request["threads"], max(len(q["ids"]) for q in questions) + 8, routes)
    experts = int(model.metadata.get("dots1.expert_count", 0))
    used = int(model.metadata.get("dots1.expert_used_count", 0))
    for number, question in enumerate(questions):
        routes.layers.clear()
        model.reset()
        model.eval(question["ids"])
        arrays[f"logits{number}"] = np.array(model.scores[: len(question["ids"])], np.float32)
        if (chosen := routes.take(experts, used)) is not None:
            arrays[f"routes{number}"] = chosen
    np.savez(request["output"], **arrays)
    vocabulary = model._model.vocab
    result = {
        "rendered": [rendered(model, question) for question in questions],
        "stop_ids": [t for t in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, t)],
        "stopped": stops(model, questions[0]["ids"], request["end_of_turn"], request["certain"]),
        "problems": [],
        "version": llama_cpp.__version__,
    }
    assert not [name for name in sys.modules if name.split(".")[0] == "dots_align"], "dots_align was imported"
    stdout.write(json.dumps(result))
    stdout.flush()  # at exit Python flushes sys.stdout only, which is another stream by now


if __name__ == "__main__":
    main()
