"""An exported checkpoint as its users meet it: the README's snippet, the chat, another stage starting from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dots_align import cli
from dots_align.checkpoint import load_model, save_model, staged
from dots_align.config import ModelSection
from dots_align.data import synthetic
from dots_align.data.chat import stop_token_ids
from dots_align.data.tokenizer import train_tokenizer
from dots_align.export.targets import export
from dots_align.model.dots1 import create_model, preset_config

CHAT = """
import sys
from pathlib import Path
from dots_align.terminal_chat import chat
chat(Path(sys.argv[1]), system=None, temperature=0.0, max_tokens=8, seed=0)
"""


@pytest.fixture(scope="module", autouse=True)
def single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified export of a small bf16 checkpoint."""
    root = tmp_path_factory.mktemp("e2e")
    tokenizer = train_tokenizer(synthetic.corpus(400), 512, 2048)
    config = preset_config("tiny", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = create_model(config, 0, stop_token_ids(tokenizer))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)).flip(0))
    model.to(dtype=torch.bfloat16)
    recipe = {"stage": "sft", "model": {"preset": "tiny"}, "output_dir": str(root)}
    with staged(root / "checkpoint-1", {"stage": "sft", "step": 1, "recipe": recipe}) as staging:
        save_model(model, tokenizer, staging)
    return export(root / "checkpoint-1", root / "export")


def test_readme_snippet_runs_where_dots_align_is_not(exported: Path) -> None:
    snippet = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet is not None
    script = (
        snippet[1].replace("max_new_tokens=256", "max_new_tokens=8")
        + "import sys; assert 'dots_align' not in sys.modules"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=exported, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_gguf_snippet_of_its_card_runs(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    cli.main(["export", str(exported), "--output", str(tmp_path / "out"), "--to", "gguf:F16", "gguf:Q8_0"])
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet is not None
    assert '"model-Q8_0.gguf"' in snippet[1]
    script = snippet[1].replace("max_tokens=256", "max_tokens=8")
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path / "out", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_bf16_export_was_proven(exported: Path) -> None:
    proof = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))["verification"]
    assert proof["num_identical"] + len(proof["ties"]) == proof["num_prompts"] == 5
    assert json.loads((exported / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_chat_with_the_export(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHAT, str(exported)], input="1+1?\n你好\n", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_an_export_is_a_checkpoint_again(exported: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(ModelSection(path=str(exported), dtype="bfloat16"))
    bias = model.get_submodule("model.layers.1.mlp.gate").e_score_correction_bias
    assert bias.dtype == torch.float32
    assert tokenizer.eos_token == "<|endofresponse|>"
    again = export(exported, tmp_path / "again")
    ours, theirs = load_file(exported / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    histories = [json.loads((d / "manifest.json").read_text(encoding="utf-8"))["training"] for d in (exported, again)]
    assert histories[0] == histories[1]
