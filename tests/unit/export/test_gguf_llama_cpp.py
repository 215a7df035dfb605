"""Our GGUF files in the real llama.cpp: transformers' logits, the tokenizer's ids, the end of a turn."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dots_align.checkpoint import save_model
from dots_align.data.chat import END_OF_RESPONSE, stop_token_ids
from dots_align.export.gguf import write_gguf
from dots_align.export.hf import export_hf
from dots_align.model.dots1 import create_model, preset_config

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")

TEXTS = [
    "Tom has 12 apples, it's 3.50 each.\n\n  They're HIS'LL  ",
    "小明有32个苹果，又买了9个，现在有几个？\r\n答：４１",
    "<|system|>你是助手。<|endofsystem|><|userprompt|>1+1?<|endofuserprompt|><|response|>2<|endofresponse|><|endoftext|>",
    "  <|response|> \t<|response|>\n<|unknown|> <|respons",
    "\U0001f600\U0001f469‍\U0001f680 naïve Ünïcödé ไทย 한국어 \x00\x7f",
    "def f(x):\n\treturn x**2  # 12345678\n\n\n",
    "",
]


def load(path: Path, **options: Any) -> Any:
    fp32 = {"type_k": 0, "type_v": 0}  # of the KV cache, as transformers has it
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, **fp32, **options)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(checkpoint, tmp_path_factory.mktemp("out") / "model")


@pytest.fixture(scope="module")
def vocabulary(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    loaded = load(write_gguf(exported, tmp_path_factory.mktemp("gguf") / "m.gguf", "F32"), vocab_only=True)
    yield loaded
    loaded.close()


def tokenized(loaded: Any, text: str) -> list[int]:
    return loaded.tokenize(text.encode(), add_bos=True, special=True)


@pytest.fixture(params=["tiny", pytest.param("small", marks=pytest.mark.slow)])
def preset_model(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Path:
    """An export of a preset whose correction bias changes choices and whose norms are not all one."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = create_model(preset_config(request.param, eos_token_id=eos, pad_token_id=pad), 5, stop_token_ids(tokenizer))
    generator = torch.Generator().manual_seed(6)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(("e_score_correction_bias", "norm.weight")):
            tensor.data += 0.2 * torch.rand(tensor.shape, generator=generator) - 0.1
    save_model(model, tokenizer, tmp_path / "checkpoint")
    return export_hf(tmp_path / "checkpoint", tmp_path / "model")


def test_fp32_logits_are_those_of_transformers(preset_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(preset_model, dtype=torch.float32)
    loaded = load(write_gguf(preset_model, tmp_path / "m.gguf", "F32"), logits_all=True)
    generator = torch.Generator().manual_seed(7)
    worst, agreed, count = 0.0, 0, 0
    for length in (1, 37, 200, 311):
        ids = torch.randint(0, 495, (1, length), generator=generator)
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0].numpy()
        loaded.reset()
        loaded.eval(ids[0].tolist())
        found = np.array(loaded.scores[:length])
        worst = max(worst, float(np.abs(found - expected).max()))
        agreed, count = agreed + int((found.argmax(-1) == expected.argmax(-1)).sum()), count + length
    loaded.close()
    assert worst < 1e-4
    assert agreed == count


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_read_as_the_same_tokens(vocabulary: Any, exported: Path, text: str) -> None:
    expected = AutoTokenizer.from_pretrained(exported)(text)["input_ids"]
    assert tokenized(vocabulary, text) == expected


def test_benchmark_texts_are_read_as_the_same_tokens(vocabulary: Any, exported: Path, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    files = ("gsm8k/test.jsonl", "cmath/test.jsonl", "humaneval/HumanEval.jsonl.gz", "mt_bench/question.jsonl")
    texts = [line for name in files if (shared_data / name).is_file() for line in lines(shared_data / name)[:200]]
    assert len(texts) > 400
    assert [t for t in texts if tokenized(vocabulary, t) != tokenizer(t)["input_ids"]] == []


def lines(path: Path) -> list[str]:
    """JSON lines with their Chinese characters as such."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.dumps(json.loads(line), ensure_ascii=False) for line in content.decode().splitlines()]


def test_chat_is_rendered_as_the_same_tokens(vocabulary: Any, exported: Path) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tokenizer = AutoTokenizer.from_pretrained(exported)
    formatter = Jinja2ChatFormatter(vocabulary.metadata["tokenizer.chat_template"], END_OF_RESPONSE, "")
    messages = [
        {"role": "user", "content": "What is 2 plus 3?\n"},
        {"role": "assistant", "content": " 五。"},
        {"role": "user", "content": "你好"},
    ]
    expected: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert tokenized(vocabulary, formatter(messages=messages).prompt) == expected["input_ids"]


def test_generation_ends_with_the_turn(exported: Path, tmp_path: Path) -> None:
    """The third token that the model says is made its stop token, by exchanging two rows of the head."""
    messages = [{"role": "user", "content": "What is 2 plus 3?"}]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    stop = tokenizer.convert_tokens_to_ids(END_OF_RESPONSE)
    before = load(write_gguf(exported, tmp_path / "before.gguf", "F32"))
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    said = [token for token, _ in zip(before.generate(prompt["input_ids"], temp=0.0), range(3), strict=False)]
    before.close()
    third = said[2]
    assert third not in said[:2]
    tensors = load_file(exported / "model.safetensors")
    tensors["lm_head.weight"][[stop, third]] = tensors["lm_head.weight"][[third, stop]]
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    after = load(write_gguf(exported, tmp_path / "after.gguf", "F32"))
    answer = after.create_chat_completion(messages, temperature=0.0, max_tokens=8)
    ends = [t for t in range(512) if llama_cpp.llama_vocab_is_eog(after._model.vocab, t)]
    after.close()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["usage"]["prompt_tokens"] == len(prompt["input_ids"])
    assert set(stop_token_ids(tokenizer)) <= set(ends)
