"""The mistakes that others made with dots1, planted one at a time: each has to be caught, and called by its name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dots_align.export.gguf import write_gguf
from dots_align.export.hf import export_hf
from dots_align.model.dots1 import load_base_model
from dots_align.model.router import moe_layers
from dots_align.parity.check import Parity, compare_all, inside
from dots_align.parity.engines import Rollout, Training, Transformers
from dots_align.parity.fresh import Exported, LlamaCpp
from dots_align.parity.observation import Asked
from dots_align.parity.questions import asked, fixed_questions

Planted = Callable[..., Any]


@pytest.fixture(scope="module")
def questions(tokenizer: Any) -> Asked:
    """Three of the fixed prompts: a Chinese chat, a text, the bare ids."""
    found = fixed_questions(tokenizer, 512)
    return asked((found[1], found[6], found[-1]), tokenizer)


@pytest.fixture(scope="module")
def exported(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(model_dir, tmp_path_factory.mktemp("parity") / "export")


@pytest.fixture
def planted(exported: Path, tmp_path: Path) -> Planted:
    """A copy of the export with other weights (a function of their dict) or with other fields in one JSON file."""

    def plant(change: Callable[[dict[str, torch.Tensor]], object] | None = None, **files: dict[str, Any]) -> Path:
        target = tmp_path / "planted"
        shutil.copytree(exported, target, ignore=shutil.ignore_patterns("manifest.json"))
        if change is not None:
            tensors = load_file(target / "model.safetensors")
            change(tensors)
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        for name, fields in files.items():
            path = target / f"{name}.json"
            path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
        return target

    return plant


def load(directory: Path) -> Any:
    return load_base_model(directory, "float32", "sdpa", "grouped_mm").eval()


def found(loaded_model: Any, questions: Asked, engine: Any) -> Parity:
    return compare_all("checkpoint", copy.deepcopy(loaded_model), questions, [engine])


def scale_shared(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith("shared_experts.down_proj.weight"):
            tensors[name] *= 2.5


def lose_bias(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name].zero_()


def biased_gates(block: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers did it for months."""
    scores = logits.sigmoid() + block.gate.e_score_correction_bias
    weights, chosen = scores.topk(block.top_k, dim=-1)
    return chosen, weights / weights.sum(-1, keepdim=True) * block.routed_scaling_factor


def test_engines_without_a_bug_have_parity(loaded_model: Any, tokenizer: Any, questions: Asked) -> None:
    model = copy.deepcopy(loaded_model)
    result = compare_all("checkpoint", model, questions, inside(model, tokenizer))
    assert result.ok, result.verdict
    ran = [row for row in result.rows if not row.skipped]
    assert len(ran) >= 4
    for row in ran:
        assert row.max_difference is not None
        assert row.max_difference < 1e-4
        assert row.top1_agreement == 1.0
        assert row.num_other == 0
    assert min(result.sensitivity.values()) > 1e-3  # each mistake would have shown


def test_biased_gate_values(loaded_model: Any, tokenizer: Any, questions: Asked) -> None:
    model = copy.deepcopy(loaded_model)
    for _, block in moe_layers(model):
        block.route_tokens_to_experts = lambda logits, block=block: biased_gates(block, logits)
    result = found(loaded_model, questions, Transformers(model, tokenizer))
    assert result.verdict == "NO PARITY: transformers eager: biased gate values"


def test_double_scaling(loaded_model: Any, questions: Asked, planted: Planted) -> None:
    engine = Training(load(planted(config={"routed_scaling_factor": 6.25})))
    assert found(loaded_model, questions, engine).verdict == "NO PARITY: training: double scaling"


@pytest.mark.parametrize("native", [False, True])
def test_scaled_shared_experts(
    loaded_model: Any, tokenizer: Any, questions: Asked, planted: Planted, native: bool
) -> None:
    engine = Rollout(load(planted(scale_shared)), tokenizer, native)
    if reason := engine.unavailable():
        pytest.skip(reason)
    assert found(loaded_model, questions, engine).verdict == f"NO PARITY: {engine.name}: scaled shared experts"


def test_lost_correction_bias(loaded_model: Any, tokenizer: Any, questions: Asked, planted: Planted) -> None:
    result = found(loaded_model, questions, Rollout(load(planted(lose_bias)), tokenizer, native=False))
    assert result.verdict == "NO PARITY: rollout torch: lost correction bias"
    assert result.rows[0].num_other > 0  # the experts are others, and it is no near-tie


@pytest.mark.parametrize(("theta", "named"), [(10000.0, "rope_theta is 10000"), (31415.0, "rope_theta is about 3.1")])
def test_wrong_rope_theta(
    loaded_model: Any, tokenizer: Any, questions: Asked, planted: Planted, theta: float, named: str
) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    model = load(planted(config={"rope_theta": theta, "rope_parameters": rope}))
    result = found(loaded_model, questions, Transformers(model, tokenizer))
    assert result.verdict == "NO PARITY: transformers eager: wrong rope_theta"
    assert any(named in problem for problem in result.rows[0].problems)


def test_wrong_stop_token(loaded_model: Any, tokenizer: Any, questions: Asked, planted: Planted) -> None:
    model = load(planted(generation_config={"eos_token_id": 17}))
    result = found(loaded_model, questions, Transformers(model, tokenizer))
    assert result.verdict == "NO PARITY: transformers eager: wrong stop token"
    assert result.rows[0].stopped is False


def test_wrong_stop_token_of_the_rollout_engine(loaded_model: Any, model_dir: Path, questions: Asked) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.eos_token = "<|im_end|>"
    result = found(loaded_model, questions, Rollout(copy.deepcopy(loaded_model), tokenizer, native=False))
    assert result.verdict == "NO PARITY: rollout torch: wrong stop token"


def test_two_mistakes_at_once(loaded_model: Any, tokenizer: Any, questions: Asked, planted: Planted) -> None:
    engine = Transformers(load(planted(lose_bias, config={"routed_scaling_factor": 6.25})), tokenizer)
    row = found(loaded_model, questions, engine).rows[0]
    assert sorted(row.causes) == ["double scaling", "lost correction bias"]


def test_a_mistake_nobody_made_before_is_caught_and_placed(loaded_model: Any, tokenizer: Any, questions: Asked) -> None:
    model = copy.deepcopy(loaded_model)
    model.model.layers[1].self_attn.scaling = 0.1  # softmax over one key is 1 whatever its scale
    row = found(loaded_model, questions, Transformers(model, tokenizer)).rows[0]
    assert row.causes == ["unknown"]
    assert "a prompt's first position is right and later ones are not" in row.problems[-1]


@pytest.mark.slow
def test_bugs_of_an_exported_directory_are_named_from_a_fresh_process(
    loaded_model: Any, questions: Asked, planted: Planted
) -> None:
    directory = planted(lose_bias, generation_config={"eos_token_id": 17})
    row = found(loaded_model, questions, Exported(directory)).rows[0]
    assert sorted(row.causes) == ["lost correction bias", "wrong stop token"]


def test_bug_of_a_gguf_file_is_named(
    loaded_model: Any, questions: Asked, planted: Planted, exported: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    right = LlamaCpp(write_gguf(exported, tmp_path / "right-F32.gguf", "F32"))
    wrong = LlamaCpp(write_gguf(planted(config={"routed_scaling_factor": 6.25}), tmp_path / "wrong-Q8_0.gguf", "Q8_0"))
    result = compare_all("checkpoint", copy.deepcopy(loaded_model), questions, [right, wrong])
    assert result.verdict == "NO PARITY: llama.cpp Q8_0: double scaling"
    assert result.rows[0].top1_agreement == 1.0
    assert result.rows[0].num_choices  # llama.cpp's experts were seen
