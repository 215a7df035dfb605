"""`--to adapter`: what PEFT loads by itself, proven before it is there."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dots_align import cli
from dots_align.checkpoint import load_model
from dots_align.config import ModelSection
from dots_align.export.adapter import export_adapter
from dots_align.export.verify import verify_export


def test_adapter_alone_answers_like_the_checkpoint(checkpoint: Path, adapter: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "adapter"
    cli.main(["export", str(adapter), "--to", "adapter", "--base", "someone/base", "--output", str(output)])
    names = {path.name for path in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "manifest.json"} <= names
    assert not [name for name in names if name.startswith("model")]
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    assert not [p for p in output.iterdir() if str(checkpoint.parents[2]).encode() in p.read_bytes()]
    assert "PeftModel.from_pretrained" in (output / "README.md").read_text(encoding="utf-8")
    proof = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["verification"]
    assert proof["num_identical"] + len(proof["ties"]) == proof["num_prompts"] > 0

    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("What is 17 plus 25?", return_tensors="pt")["input_ids"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), output)
    ours, _ = load_model(ModelSection(path=str(adapter)))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def test_other_weights_are_noticed(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    output = export_adapter(adapter, tmp_path / "adapter", "someone/base")
    weights = load_file(output / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, output / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not answer like its checkpoint|log-probabilities differ"):
        verify_export(adapter, output, base=checkpoint)


def test_what_cannot_be_exported_is_said(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no adapter"):
        export_adapter(checkpoint, tmp_path / "out", "someone/base")
    with pytest.raises(SystemExit, match="--base NAME"):
        cli.main(["export", str(adapter), "--to", "adapter", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
