"""scripts/llama_cpp_anchor.py: what it generates is what the model says, and its options change only the speed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dots_align.checkpoint import load_model, save_model
from dots_align.config import ModelSection
from dots_align.data import synthetic
from dots_align.data.chat import stop_token_ids
from dots_align.data.tokenizer import train_tokenizer
from dots_align.export.gguf import write_gguf
from dots_align.model.dots1 import create_model, preset_config

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))  # as for a script beside it
from llama_cpp_anchor import Generated, LlamaCpp

sys.path.pop(0)

PROMPTS = [[5, 6, 7, 300, 2, 44], [17], list(range(20, 61))]
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("anchor") / "checkpoint"
    tokenizer = train_tokenizer(synthetic.corpus(400), 512, 2048)
    config = preset_config("tiny", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    save_model(create_model(config, 0, stop_token_ids(tokenizer)), tokenizer, directory)
    write_gguf(directory, directory.parent / "m.gguf", "F32")
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_model(ModelSection(path=str(checkpoint)))[0].eval()


@pytest.fixture(scope="module", params=[True, False], ids=["unified", "separate"])
def anchor(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[LlamaCpp]:
    path = checkpoint.parent / "m.gguf"
    with LlamaCpp(path, num_threads=1, kv_type="F32", kv_unified=request.param) as loaded:
        yield loaded


def check_logprobs(model: Any, generated: Generated) -> None:
    """Every sample's log-probs are those of a teacher-forced pass through transformers."""
    for prompt, samples, logprobs in zip(PROMPTS, generated.response_ids, generated.logprobs, strict=True):
        for ids, found in zip(samples, logprobs, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
            assert np.abs(np.array(found) - expected.numpy()).max() < 1e-4


def test_greedy_samples_are_those_of_transformers(anchor: LlamaCpp, model: Any) -> None:
    generated = anchor.generate(PROMPTS, 2, MAX_TOKENS, temperature=0)
    for prompt, samples in zip(PROMPTS, generated.response_ids, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        expected = output[0, len(prompt) :].tolist()
        assert samples == [expected, expected]
    check_logprobs(model, generated)


def test_samples_differ_and_carry_their_logprobs(anchor: LlamaCpp, model: Any) -> None:
    generated = anchor.generate(PROMPTS, 6, MAX_TOKENS, seed=1)
    assert all(len({tuple(ids) for ids in group}) > 1 for group in generated.response_ids)
    assert generated.num_tokens == 3 * 6 * MAX_TOKENS
    assert 0 < generated.prefill_seconds + generated.sampling_seconds < generated.seconds
    assert generated.tokens_per_second == pytest.approx(generated.num_tokens / generated.seconds)
    check_logprobs(model, generated)
    assert anchor.generate(PROMPTS, 6, MAX_TOKENS, seed=1).response_ids == generated.response_ids
    assert anchor.generate(PROMPTS, 6, MAX_TOKENS, seed=2).response_ids != generated.response_ids


def test_samples_end_at_stop_tokens_and_others_go_on(anchor: LlamaCpp, model: Any) -> None:
    stops = range(0, 512, 5)
    generated = anchor.generate(PROMPTS, 8, MAX_TOKENS, seed=3, stop_token_ids=stops)
    lengths = {len(ids) for group in generated.response_ids for ids in group}
    assert len(lengths) > 3
    for ids in (ids for group in generated.response_ids for ids in group):
        assert all(token % 5 for token in ids[:-1])
        assert ids[-1] % 5 == 0 or len(ids) == MAX_TOKENS
    check_logprobs(model, generated)


def test_each_prompt_may_have_a_limit_of_its_own(anchor: LlamaCpp, model: Any) -> None:
    limits = [3, MAX_TOKENS, 1]
    generated = anchor.generate(PROMPTS, 4, limits, seed=5)
    assert [[len(ids) for ids in group] for group in generated.response_ids] == [[n] * 4 for n in limits]
    check_logprobs(model, generated)
    held = sum(len(prompt) + 4 * limit for prompt, limit in zip(PROMPTS, limits, strict=True))
    assert generated.num_cells == (held if anchor.kv_unified else 12 * 256)


def test_temperature_sharpens(anchor: LlamaCpp) -> None:
    cold, warm = (anchor.generate(PROMPTS, 8, MAX_TOKENS, temperature=t, seed=4) for t in (0.3, 1.0))
    assert np.mean(cold.logprobs) > np.mean(warm.logprobs) + 0.5


def test_bad_requests_are_refused(anchor: LlamaCpp, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="up to 256 sequences, and no prompt may be empty"):
        anchor.generate([[]], 1, 4)
    with pytest.raises(ValueError, match="up to 256 sequences"):
        anchor.generate(PROMPTS, 100, 4)
    with pytest.raises(ValueError, match="give one, or one each, at least 1"):
        anchor.generate(PROMPTS, 1, [4, 0, 4])
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"broken.gguf: llama.cpp cannot load it"):
        LlamaCpp(tmp_path / "broken.gguf")


def test_command_prints_figures(checkpoint: Path, repo_root: Path) -> None:
    script, path = repo_root / "scripts" / "llama_cpp_anchor.py", checkpoint.parent / "m.gguf"
    sizes = ["--prompts", "2", "--samples", "3", "--max-tokens", "4", "--threads", "1", "--rounds", "1"]
    done = subprocess.run([sys.executable, script, path, *sizes], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_tokens"] == 24
