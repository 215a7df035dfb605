"""The engines that run in processes of their own: an exported directory, a GGUF file."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dots_align.data.chat import as_dicts
from dots_align.export.verify import ask_fresh_process
from dots_align.parity.engines import CERTAIN
from dots_align.parity.observation import EXACT, Asked, Observation
from dots_align.runtime import device

_HERE = Path(__file__).parent
LLAMA_MISSING = "llama-cpp-python is not installed (pip install 'dots-align[llama]')"


class Exported:
    """A directory in the hub's layout, loaded by plain transformers.

    Args:
        python: the interpreter of another environment, to see what the transformers there makes of it.
    """

    def __init__(self, directory: Path, python: str = sys.executable, name: str | None = None) -> None:
        self.directory, self.python = directory, python
        self.name = name or "exported copy"

    def observe(self, asked: Asked) -> Observation:
        request = {"directory": str(self.directory.resolve()), "device": str(device())}
        failure = f"{self.directory}: transformers ({self.python}) cannot load and run it"
        result, observation = _ask(_HERE / "fresh_transformers.py", request, asked, failure, self.python)
        if result["problems"]:
            raise ValueError(f"{self.directory}: transformers {result['version']} reports {result['problems'][0]}")
        if self.python != sys.executable:
            self.name = f"transformers {result['version']}"
        return observation


class LlamaCpp:
    """A GGUF file in llama.cpp. Its precision is taken from its name: model-Q8_0.gguf."""

    def __init__(self, path: Path, precision: str | None = None) -> None:
        self.path = path
        self.precision = precision or path.stem.rpartition("-")[2]
        self.name = f"llama.cpp {self.precision}"

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if importlib.util.find_spec("llama_cpp") else LLAMA_MISSING

    def observe(self, asked: Asked) -> Observation:
        request = {"path": str(self.path.resolve()), "threads": torch.get_num_threads()}
        failure = f"{self.path}: llama.cpp cannot load and run it"
        _, found = _ask(_HERE / "fresh_llama.py", request, asked, failure, sys.executable, self.precision)
        return found


def _ask(
    script: Path, request: dict[str, Any], asked: Asked, failure: str, python: str, precision: str = EXACT
) -> tuple[dict[str, Any], Observation]:
    questions = [{"ids": list(q.token_ids), "messages": as_dicts(q.messages), "text": q.text} for q in asked.questions]
    request = {**request, "questions": questions, "end_of_turn": asked.end_of_turn, "certain": CERTAIN}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.npz"
        result = ask_fresh_process(script, {**request, "output": str(output)}, failure, python)
        with np.load(output) as arrays:
            logits, routes = (_tensors(arrays, kind, len(questions)) for kind in ("logits", "routes"))
    stop_ids = frozenset(token for token in result["stop_ids"] if token is not None)
    return result, Observation(
        logits=logits,
        routes=routes,
        rendered=result["rendered"],
        stop_ids=stop_ids,
        stopped=result["stopped"],
        precision=precision,
    )


def _tensors(arrays: Any, kind: str, count: int) -> list[torch.Tensor] | None:
    names = [f"{kind}{number}" for number in range(count)]
    return [torch.from_numpy(arrays[name]) for name in names] if all(name in arrays for name in names) else None
