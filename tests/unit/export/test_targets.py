"""`dots-align export --to …`: which files, proven how, and what is refused before anything is written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from dots_align.checkpoint import check_whole
from dots_align.export.gguf import FORMATS, write_gguf
from dots_align.export.hf import export_hf
from dots_align.export.targets import K_QUANTS, TARGETS, export, gguf_formats
from dots_align.export.verify_gguf import MAX_MEDIAN_LOGPROB_DIFFERENCE, NOT_INSTALLED, verify_gguf

Edit = Callable[[Path, str, Callable[[str], str]], Path]
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: pip install '.[llama]'"
)


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(checkpoint, tmp_path_factory.mktemp("out") / "model")


def test_targets_are_parsed() -> None:
    assert gguf_formats(TARGETS) == [*FORMATS, *K_QUANTS] == list(MAX_MEDIAN_LOGPROB_DIFFERENCE)
    assert gguf_formats(["gguf:Q8_0", "hf", "gguf:Q8_0"]) == ["Q8_0"]
    for targets in (["gguf"], ["hf", "gguf:Q3"], ["HF"], []):
        with pytest.raises(ValueError, match=r"unknown target '.*'; choose from hf, gguf:F32, gguf:F16"):
            gguf_formats(targets)


@needs_llama_cpp
def test_k_quants_are_made_by_llama_cpp_and_proven(checkpoint: Path, tmp_path: Path) -> None:
    output = export(checkpoint, tmp_path / "model", targets=["gguf:Q8_0", "gguf:Q4_K_M"])
    assert {p.name for p in output.glob("*.gguf")} == {"model-Q8_0.gguf", "model-Q4_K_M.gguf"}
    proof = manifest(output)["gguf"]["Q4_K_M"]
    assert 0.01 < proof["median_logprob_difference"] < MAX_MEDIAN_LOGPROB_DIFFERENCE["Q4_K_M"]
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(output / "model-Q4_K_M.gguf").tensors}
    assert kinds["blk.1.exp_probs_b.bias"] == kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.1.ffn_gate_exps.weight"] not in ("F32", "F16", "Q8_0")


def test_k_quants_without_llama_cpp_are_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, no_llama_cpp: None
) -> None:
    with pytest.raises(ValueError, match=r"gguf:Q6_K is made by llama\.cpp's quantizer, which is not installed"):
        export(checkpoint, tmp_path / "model", targets=["gguf:Q6_K"])
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
def test_adapter_is_merged_into_proven_gguf_files(adapter: Path, tmp_path: Path) -> None:
    output = export(adapter, tmp_path / "model", targets=["hf", "gguf:F32", "gguf:BF16"])
    check_whole(output)
    assert {"model-F32.gguf", "model-BF16.gguf", "model.safetensors"} <= manifest(output)["files"].keys()
    proofs = manifest(output)["gguf"]
    assert proofs.keys() == {"F32", "BF16"}
    assert all(proof["num_tokens"] == proofs["F32"]["num_best"] for proof in proofs.values())
    assert proofs["F32"]["median_logprob_difference"] < 1e-5
    assert 1e-4 < proofs["BF16"]["median_logprob_difference"] < 0.02
    merged = load_file(output / "model.safetensors")["model.layers.2.self_attn.q_proj.weight"]
    stored = next(t for t in GGUFReader(output / "model-F32.gguf").tensors if t.name == "blk.2.attn_q.weight")
    assert torch.equal(torch.from_numpy(stored.data.copy()), merged)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "GGUF F32, BF16" in card
    assert "model-BF16.gguf was loaded by llama.cpp in a fresh process" in card
    assert "from transformers import" in card


def test_gguf_alone_leaves_nothing_half(checkpoint: Path, tmp_path: Path) -> None:
    output = export(checkpoint, tmp_path / "model", targets=["gguf:Q8_0"])
    assert {p.name for p in output.iterdir()} == {"model-Q8_0.gguf", "manifest.json", "README.md"}
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "library_name: gguf" in card
    assert "transformers import" not in card
    export(checkpoint, output, overwrite=True, targets=["gguf:F16"])
    assert {p.name for p in output.iterdir()} == {"model-F16.gguf", "manifest.json", "README.md"}


@pytest.mark.usefixtures("no_llama_cpp")
def test_without_llama_cpp_the_proof_is_missing_and_said_to_be(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = export(checkpoint, tmp_path / "model", targets=["hf", "gguf:F16"])
    assert manifest(output)["gguf"] == {"F16": {"skipped": NOT_INSTALLED}}
    assert f"model-F16.gguf: {NOT_INSTALLED}." in (output / "README.md").read_text(encoding="utf-8")
    assert NOT_INSTALLED in caplog.text


def test_what_gguf_cannot_hold_is_refused_before_anything_is_written(
    checkpoint: Path, edited_copy: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = edited_copy(
        checkpoint, "config.json", lambda t: t.replace('"hidden_act": "silu"', '"hidden_act": "gelu"')
    )
    monkeypatch.setattr("dots_align.export.targets.export_hf", lambda *_: pytest.fail("was written"))
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu', llama\.cpp's dots1 needs 'silu'"):
        export(changed, tmp_path / "model", targets=["hf", "gguf:F16"])


@needs_llama_cpp
class TestProof:
    """Each way in which a GGUF file may differ from its checkpoint is noticed, in the coarsest format too."""

    @pytest.mark.parametrize("format", ["F32", "Q8_0"])
    def test_faithful(self, checkpoint: Path, exported: Path, tmp_path: Path, format: str) -> None:
        path = write_gguf(exported, tmp_path / "m.gguf", format)
        proof = verify_gguf(checkpoint, {format: path})[format]
        assert proof["num_tokens"] >= proof["num_best"] > 0.8 * proof["num_tokens"]
        assert proof["median_logprob_difference"] < MAX_MEDIAN_LOGPROB_DIFFERENCE[format] / 2
        assert format != "F32" or proof["num_identical"] == proof["num_prompts"] == 5

    def refused(self, checkpoint: Path, broken: Path, format: str, match: str) -> None:
        (broken / "manifest.json").unlink(missing_ok=True)
        path = write_gguf(broken, broken / "m.gguf", format)
        with pytest.raises(ValueError, match=match) as error:
            verify_gguf(checkpoint, {format: path})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("format", ["F32", "Q8_0"])
    def test_lost_correction_bias(self, checkpoint: Path, exported: Path, tmp_path: Path, format: str) -> None:
        broken = Path(shutil.copytree(exported, tmp_path / "broken"))
        tensors = load_file(broken / "model.safetensors")
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                tensors[name].zero_()
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        self.refused(checkpoint, broken, format, "is not its checkpoint")

    @pytest.mark.parametrize(
        ("name", "old", "new", "match"),
        [
            ("config.json", '"rope_theta": 10000000.0', '"rope_theta": 10000.0', "is not its checkpoint"),
            ("config.json", '"routed_scaling_factor": 2.5', '"routed_scaling_factor": 1.0', "is not its checkpoint"),
            ("chat_template.jinja", "helpful assistant", "helpful robot", "reads the prompt 'What is 17 plus 25"),
        ],
    )
    def test_changed_file(
        self, checkpoint: Path, exported: Path, edited_copy: Edit, name: str, old: str, new: str, match: str
    ) -> None:
        broken = edited_copy(exported, name, lambda text: text.replace(old, new))
        self.refused(checkpoint, broken, "Q8_0", match)

    def test_lost_stop_token(self, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
        path = write_gguf(exported, tmp_path / "m.gguf", "F16")
        reader = GGUFReader(path, "r+")
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
            field = reader.fields[key]
            field.parts[field.data[0]][0] = 7
        reader.data.flush()
        with pytest.raises(ValueError, match=r"llama.cpp does not stop at token ids \[\d+\]"):
            verify_gguf(checkpoint, {"F16": path})

    def test_truncated_file(self, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
        path = write_gguf(exported, tmp_path / "m.gguf", "F16")
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ValueError, match=r"m.gguf: llama.cpp cannot load and run it: "):
            verify_gguf(checkpoint, {"F16": path})
