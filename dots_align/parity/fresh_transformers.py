"""Runs an exported directory as its users will: any transformers, in a process of its own, no dots_align imported.

Run by path (`python -P fresh_transformers.py`), never imported. It works from transformers 4.57 on. Reads one JSON
request from stdin: `directory`, `device`, `output` (a file to write), `end_of_turn`, `certain` (a bias no logit equals)
and `questions`, each with `ids` and one of `messages`, `text` or neither. Writes the logits and routes of each
question to `output` (npz: `logits0`, `routes0`, ...) and one JSON object to stdout: `rendered`, `stop_ids`, `stopped`,
`problems` (what transformers had to guess while loading) and `version`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(directory: str, device: str) -> tuple[Any, Any, list[str]]:
    """The model in fp32 with eager attention, the tokenizer, and what did not fit."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    new = int(transformers.__version__.split(".")[0]) >= 5
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        **{"dtype" if new else "torch_dtype": torch.float32},
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, info = loaded
    problems = [
        f"{kind.removesuffix('_keys')} tensor {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info[kind]))
    ]
    return model.to(device).eval(), tokenizer, problems


class Routes:
    """Collects the experts chosen by each MoE layer of a forward: as the experts are told (transformers 5), or where
    they are not, as the gate says (transformers 4).
    """

    def __init__(self, model: Any) -> None:
        self.told: list[torch.Tensor] = []
        self.said: list[torch.Tensor] = []
        for block in model.modules():
            if hasattr(block, "gate") and hasattr(block, "experts"):
                block.gate.register_forward_hook(self._from_gate)
                block.experts.register_forward_pre_hook(self._from_experts)

    def _from_gate(self, _module: Any, _arguments: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self.said += [part for part in output if not part.is_floating_point()]

    def _from_experts(self, _module: Any, arguments: tuple[Any, ...]) -> None:
        if len(arguments) > 1:
            self.told.append(arguments[1])

    def take(self) -> np.ndarray | None:
        """[T, layers, k] uint8 of the forward since the last call; None if no layer showed its choice."""
        chosen = self.told or self.said
        self.told, self.said = [], []
        return torch.stack(chosen, 1).cpu().numpy().astype(np.uint8) if chosen else None


def rendered(tokenizer: Any, question: dict[str, Any]) -> list[int] | None:
    if question.get("messages"):
        encoded = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])
    return None if question.get("text") is None else list(tokenizer(question["text"])["input_ids"])


def stops(model: Any, ids: list[int], end: int, certain: float) -> bool:
    """Whether `generate` ends where the end of the turn is certain."""
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs,
        # Without a mask generate() takes tokens that equal the padding id for padding.
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=3,
        sequence_bias=[[[end], certain]],
    )
    return output[0, len(ids) :].tolist() == [end]


@torch.no_grad()
def main() -> None:
    # Libraries may print: the result has the real stdout to itself.
    stdout, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    model, tokenizer, problems = load(request["directory"], request["device"])
    questions, arrays = request["questions"], {}
    routes = Routes(model)
    for number, question in enumerate(questions):
        ids = torch.tensor([question["ids"]], device=model.device)
        arrays[f"logits{number}"] = model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()
        if (chosen := routes.take()) is not None:
            arrays[f"routes{number}"] = chosen
    np.savez(request["output"], **arrays)
    eos = model.generation_config.eos_token_id
    result = {
        "rendered": [rendered(tokenizer, question) for question in questions],
        "stop_ids": eos if isinstance(eos, list) else [eos],
        "stopped": stops(model, questions[0]["ids"], request["end_of_turn"], request["certain"]),
        "problems": problems,
        "version": transformers.__version__,
    }
    assert not [name for name in sys.modules if name.split(".")[0] == "dots_align"], "dots_align was imported"
    stdout.write(json.dumps(result))
    stdout.flush()  # at exit Python flushes sys.stdout only, which is another stream by now


if __name__ == "__main__":
    main()
