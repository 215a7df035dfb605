"""Reading and writing the hub's layout a tensor at a time; sharded models are in tests/distributed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Dots1ForCausalLM

from dots_align.model.dots1 import load_base_model, materialize, meta_model
from dots_align.model.sharded_io import load_weights, save_weights

KEYS = ("float32", "packed", "grouped")


def filled(directory: Path) -> Dots1ForCausalLM:
    model = meta_model(directory, *KEYS)
    materialize(model, torch.device("cpu"))
    load_weights(model, directory)
    return model


def test_a_model_filled_from_meta_is_the_one_transformers_loads(model_dir: Path, token_ids) -> None:
    ours, theirs = filled(model_dir).eval(), load_base_model(model_dir, *KEYS).eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ids = torch.tensor(token_ids(12))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)  # rotary frequencies are in no file


def test_files_have_the_hubs_names_and_every_value(model: Dots1ForCausalLM, model_dir: Path, tmp_path: Path) -> None:
    save_weights(model, tmp_path, max_shard_bytes=50_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for path in files:
        found |= load_file(path)
        with safe_open(path, framework="pt") as file:
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
    expected = load_file(model_dir / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_storing_in_bf16_keeps_the_correction_bias(model: Dots1ForCausalLM, tmp_path: Path) -> None:
    save_weights(model, tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if n.endswith("e_score_correction_bias")} == {torch.float32}
    assert {t.dtype for n, t in stored.items() if not n.endswith("e_score_correction_bias")} == {torch.bfloat16}


def damaged(model_dir: Path, tmp_path: Path, change) -> Path:
    directory = tmp_path / "damaged"
    shutil.copytree(model_dir, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_missing_expert_is_named(model_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    directory = damaged(model_dir, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        filled(directory)


def test_a_tensor_of_another_shape_is_named(model_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    directory = damaged(model_dir, tmp_path, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(5, 32\), its config.json says \(64, 32\)"):
        filled(directory)
