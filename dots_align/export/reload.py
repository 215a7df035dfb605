"""Loads an exported directory as its users will: plain transformers, in a process of its own, no dots_align imported.

Run by path (`python -P reload.py`), never imported. Reads one JSON request from stdin: `directory`, `base` (the model
that `directory` is an adapter on, or null), `device`, `max_tokens` and `conversations` (lists of {role, content}).
Writes one JSON object to stdout: `answers` (`prompt_ids`, `response_ids` and `logprobs` of each conversation),
`eos_token_ids`, `pad_token_id` and `problems` (what transformers had to guess while loading).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def load(directory: str, base: str | None, device: str) -> tuple[Any, Any, list[str]]:
    """The model in fp32 (with its adapter, if there is a `base`), the tokenizer, and every tensor that was missing,
    left over or of the wrong shape.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base or directory, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    problems = [
        f"{kind.removesuffix('_keys')} tensor {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info[kind]))
    ]
    if base is not None:
        from peft import PeftModel

        model.generation_config = GenerationConfig.from_pretrained(directory)
        model = PeftModel.from_pretrained(model, directory)
    return model.to(device).eval(), tokenizer, problems


def answer(model: Any, tokenizer: Any, conversation: list[dict[str, str]], max_tokens: int) -> dict[str, list[Any]]:
    """The greedy continuation of one conversation and the log-probability of each of its tokens."""
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    # The attention mask is in `inputs`. Without it, generate() takes tokens that equal the padding id for padding.
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_tokens, output_logits=True, return_dict_in_generate=True
    )
    response = output.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.cat(output.logits).float().log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
    return {
        "prompt_ids": inputs["input_ids"][0].tolist(),
        "response_ids": response.tolist(),
        "logprobs": logprobs.tolist(),
    }


def main() -> None:
    # Libraries may print: the result has the real stdout to itself.
    stdout, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    model, tokenizer, problems = load(request["directory"], request["base"], request["device"])
    answers = [answer(model, tokenizer, c, request["max_tokens"]) for c in request["conversations"]]
    eos = model.generation_config.eos_token_id
    assert not [name for name in sys.modules if name.split(".")[0] == "dots_align"], "dots_align was imported"
    result = {
        "answers": answers,
        "eos_token_ids": eos if isinstance(eos, list) else [eos],
        "pad_token_id": model.generation_config.pad_token_id,
        "problems": problems,
    }
    stdout.write(json.dumps(result))
    stdout.flush()  # at exit Python flushes sys.stdout only, which is another stream by now


if __name__ == "__main__":
    main()
