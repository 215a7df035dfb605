"""Presets, creation and loading of dots1 models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dots1ForCausalLM

from dots_align.model.dots1 import (
    count_parameters,
    create_meta_model,
    create_model,
    lm_head,
    load_base_model,
    preset_config,
)
from dots_align.model.router import moe_layers


@pytest.fixture(scope="module")
def llm1() -> Dots1ForCausalLM:
    return create_meta_model("llm1")


@pytest.fixture
def edited(model_dir: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]:
    """A copy of the checkpoint, without its manifest, with its tensors changed."""

    def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(model_dir, copy, ignore=shutil.ignore_patterns("manifest.json"))
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        return copy

    return edit


def load(path: Path) -> Dots1ForCausalLM:
    return load_base_model(path, "float32", "packed", "grouped_mm")


def test_llm1_has_the_size_of_the_released_model(llm1: Dots1ForCausalLM) -> None:
    total, active = count_parameters(llm1)
    assert round(total / 1e9, 2) == 142.77
    assert round(active / 1e9, 1) == 14.0


@pytest.mark.parametrize(("preset", "millions"), [("tiny", (2.5, 3.5)), ("small", (100, 130))])
def test_small_presets_have_their_size(preset: str, millions: tuple[float, float]) -> None:
    total, active = count_parameters(create_meta_model(preset))
    assert millions[0] < total / 1e6 < millions[1]
    assert active < total / 2


@pytest.mark.parametrize("preset", ["tiny", "small", "llm1"])
def test_every_preset_has_the_traits_of_dots1(preset: str, llm1: Dots1ForCausalLM) -> None:
    model = llm1 if preset == "llm1" else create_meta_model(preset)
    config, first = model.config, model.model.layers[0]
    assert not hasattr(first.mlp, "experts")
    assert [index for index, _ in moe_layers(model)] == list(range(1, config.num_hidden_layers))
    _, block = moe_layers(model)[0]
    assert dict(block.gate.named_buffers())["e_score_correction_bias"].shape == (config.n_routed_experts,)
    assert "e_score_correction_bias" not in dict(block.gate.named_parameters())
    assert block.shared_experts.up_proj.out_features == 2 * config.moe_intermediate_size
    assert config.num_key_value_heads == config.num_attention_heads
    assert first.self_attn.q_norm.weight.shape == first.self_attn.k_norm.weight.shape == (config.head_dim,)
    assert first.self_attn.q_proj.bias is None
    assert lm_head(model).weight is not model.get_input_embeddings().weight
    assert not hasattr(config, "layer_types") or set(config.layer_types) == {"full_attention"}


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ValueError, match=r"unknown model preset 'big'; choose one of tiny, small, llm1"):
        preset_config("big")


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_rng() -> None:
    config = preset_config("tiny", num_hidden_layers=2, hidden_size=32)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (create_model(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert {t.dtype for t in first.values()} == {torch.float32}


def test_the_stop_tokens_given_are_those_generation_stops_at() -> None:
    model = create_model(preset_config("tiny", num_hidden_layers=2, hidden_size=32), 0, (3, 5))
    assert model.generation_config.eos_token_id == [3, 5]


def test_saving_and_loading_keeps_every_tensor_and_leaves_the_global_rng(
    loaded_model: Dots1ForCausalLM, model_dir: Path
) -> None:
    before = torch.get_rng_state()
    again = load(model_dir).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    state = loaded_model.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    biases = [t for name, t in state.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(bias.abs().max() > 0.1 for bias in biases)


def test_bfloat16_is_honoured_except_where_the_router_needs_more(model_dir: Path) -> None:
    model = load_base_model(model_dir, "bfloat16", "sdpa", "grouped_mm")
    assert lm_head(model).weight.dtype == torch.bfloat16
    (_, block), *_ = moe_layers(model)
    assert block.gate(torch.zeros(1, 64, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.7.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_refused(edited, name: str) -> None:
    path = edited(lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match="the checkpoint is not whole") as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_tensor_of_another_shape_is_refused(edited) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()

    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(edited(shorten))
