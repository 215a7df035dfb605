"""Weights read from files, an adapter folded in on the way: the same as merging into a whole model."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dots_align.config import LoraSection
from dots_align.model.dots1 import load_base_model, materialize, meta_model
from dots_align.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_adapter, merge_adapter, save_adapter
from dots_align.model.merged_files import MergedFiles, open_weights
from dots_align.model.sharded_io import hub_tensors, load_weights

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SECTIONS = {
    "attention": LoraSection(r=4, target_modules=("q_proj", "v_proj")),
    "shared experts": LoraSection(r=3, lora_alpha=5, target_modules=("shared_experts.up_proj",)),
    "one layer": LoraSection(r=8, target_modules=(), target_parameters=("model.layers.2.mlp.experts.down_proj",)),
    "everything": LoraSection(r=4, target_modules=("o_proj", "gate_proj", "down_proj"), target_parameters=EXPERTS),
}


@pytest.fixture(scope="session")
def loaded_model(model_dir: Path) -> Any:
    return load_base_model(model_dir, "float32", "packed", "grouped")  # which adapters on routed experts want


def write_adapter(model: Any, lora: LoraSection, directory: Path, base: Path, seed: int = 0) -> Path:
    adapted = add_adapter(model, lora, str(base), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_adapter(adapted, directory)
    return directory


def assert_same(files: MergedFiles, merged: Any, model_dir: Path, wanted: str) -> None:
    """The model filled from the files has the weights of the model that was merged; those named have changed."""
    read = meta_model(model_dir, "float32", "packed", "grouped")
    materialize(read, torch.device("cpu"))
    load_weights(read, files)
    plain, expected = load_file(model_dir / "model.safetensors"), hub_tensors(merged)
    for name, tensor in hub_tensors(read).items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
        if name in plain:
            assert torch.equal(tensor, plain[name]) != bool(re.search(wanted, name)), name


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("attention", r"\.[qv]_proj"),
        ("shared experts", r"shared_experts\.up"),
        ("one layer", "no tensor of its own"),
        ("everything", r"o_proj|gate_proj|down_proj"),
    ],
)
def test_read_is_as_merged(model: Any, model_dir: Path, tmp_path: Path, section: str, changed: str) -> None:
    adapter = write_adapter(copy.deepcopy(model), SECTIONS[section], tmp_path, model_dir)
    files = open_weights(adapter)
    assert isinstance(files, MergedFiles)
    assert_same(files, merge_adapter(model, adapter), model_dir, changed)


def test_an_adapter_on_an_adapter(model: Any, model_dir: Path, tmp_path: Path) -> None:
    first = write_adapter(copy.deepcopy(model), SECTIONS["everything"], tmp_path / "sft", model_dir, 1)
    second = write_adapter(copy.deepcopy(model), SECTIONS["attention"], tmp_path / "dpo", first, 2)
    files = MergedFiles(second)
    assert_same(files, merge_adapter(model, second), model_dir, r"o_proj|gate_proj|down_proj|\.[qv]_proj")


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.experts.3.up_proj", "mlp.experts.7.down_proj", "mlp.gate"])
def test_a_part_is_that_part_of_the_whole(model: Any, model_dir: Path, tmp_path: Path, name: str) -> None:
    """As a rank reads it that keeps some rows and columns."""
    files = MergedFiles(write_adapter(model, SECTIONS["everything"], tmp_path, model_dir))
    name = f"model.layers.1.{name}.weight"
    shape = files.shape(name)
    part = (slice(5, 13), slice(2, shape[1] - 3))
    torch.testing.assert_close(files.read(name, shape, part), files.read(name, shape, ())[part], atol=1e-6, rtol=1e-6)


def test_what_is_not_whole_is_refused(model: Any, model_dir: Path, tmp_path: Path) -> None:
    adapter = write_adapter(model, SECTIONS["everything"], tmp_path, model_dir)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    missing = next(key for key in tensors if ".experts." in key)
    save_file({k: v for k, v in tensors.items() if k != missing}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match=f"1 missing tensors, the first is {missing}"):
        MergedFiles(adapter)


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("rank_pattern", {"q_proj": 8}), ("bias", "all")])
def test_more_than_plain_lora_is_refused(model: Any, model_dir: Path, tmp_path: Path, key: str, value: Any) -> None:
    adapter = write_adapter(model, SECTIONS["attention"], tmp_path, model_dir)
    fields = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({**fields, key: value}))
    with pytest.raises(ValueError, match=rf"{ADAPTER_CONFIG}: {key}=.* merge it with PEFT"):
        MergedFiles(adapter)
