"""Checkpoints of a tiny random model, made once: whatever an export may lose has a value that is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dots_align.checkpoint import save_model, staged
from dots_align.config import LoraSection
from dots_align.data import synthetic
from dots_align.data.chat import stop_token_ids
from dots_align.data.tokenizer import train_tokenizer
from dots_align.export import verify
from dots_align.model.dots1 import create_model, load_base_model, preset_config
from dots_align.model.lora import add_adapter


@pytest.fixture(scope="module", autouse=True)
def short_and_single_threaded() -> Iterator[None]:
    """A tiny model gains nothing from threads and, on a busy machine, waits for them; short answers tell as much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(verify, "MAX_TOKENS", 12)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/sft/checkpoint-3: a full checkpoint in fp32, trained by nobody, with a manifest that says otherwise."""
    tokenizer = train_tokenizer(synthetic.corpus(400), 512, 2048)
    config = preset_config("tiny", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = create_model(config, 0, stop_token_ids(tokenizer))
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.rand(buffer.shape, generator=generator) - 0.1)
    runs = tmp_path_factory.mktemp("home") / "runs"
    recipe = {
        "stage": "sft",
        "output_dir": str(runs / "sft"),
        "model": {"path": None, "preset": "tiny"},
        "data": {"path": str(runs / "private" / "data.jsonl"), "system_prompt": "/no_think be brief"},
        "optim": {"learning_rate": 2e-5},
    }
    manifest = {"stage": "sft", "step": 3, "recipe": recipe, "recipe_hash": "abc", "data_hash": "def"}
    with staged(runs / "sft" / "checkpoint-3", manifest) as staging:
        save_model(model, tokenizer, staging)
    metrics = {"exact_match": 0.25, "stop_rate": 1.0}
    evaluation = {"metrics": metrics, "num_prompts": 8, "data": "synthetic:heldout", "samples": []}
    (runs / "sft" / "checkpoint-3" / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return runs / "sft" / "checkpoint-3"


@pytest.fixture(scope="session")
def adapter(checkpoint: Path) -> Path:
    """runs/dpo/checkpoint-2: an adapter on `checkpoint` that changes every attention layer."""
    model = load_base_model(checkpoint, "float32", "packed", "grouped_mm")
    adapted = add_adapter(model, LoraSection(r=4, target_modules=("q_proj", "v_proj")), str(checkpoint))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    recipe = {"stage": "dpo", "model": {"path": str(checkpoint), "preset": None}, "beta": 0.1, "lora": {"r": 4}}
    final = checkpoint.parents[1] / "dpo" / "checkpoint-2"
    with staged(final, {"stage": "dpo", "step": 2, "recipe": recipe}) as staging:
        adapted.save_pretrained(staging)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(checkpoint / name, staging)
    return final


@pytest.fixture
def edited_copy(tmp_path: Path) -> Callable[[Path, str, Callable[[str], str]], Path]:
    """Copies a directory without its manifest, so that one text file in it can be edited."""

    def copy(directory: Path, name: str, edit: Callable[[str], str]) -> Path:
        target = tmp_path / "edited"
        shutil.copytree(directory, target, ignore=shutil.ignore_patterns("manifest.json"))
        before = (target / name).read_text(encoding="utf-8")
        after = edit(before)
        assert after != before
        (target / name).write_text(after, encoding="utf-8")
        return target

    return copy
