"""GGUF files: the bytes of llama.cpp's own converter, what llama.cpp computes from them, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dots_align.checkpoint import save_model
from dots_align.data.chat import END_OF_RESPONSE, stop_token_ids
from dots_align.export import gguf
from dots_align.export.gguf import CHUNK_BYTES, FORMATS, encode, write_gguf
from dots_align.export.hf import export_hf
from dots_align.export.weights import expected_shapes
from dots_align.model.dots1 import create_model, preset_config

CONVERT = """
import sys
tree, source, output, format = sys.argv[1:]
sys.path[:0] = [tree + "/gguf-py", tree]
from conversion.base import TextModel
# The converter knows tokenizers by a hash of what they do; that of a freshly trained one is in no list.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import convert_hf_to_gguf
sys.argv = ["convert", source, "--outfile", output, "--outtype", format]
convert_hf_to_gguf.main()
"""
Edit = Callable[[Path, str, Callable[[str], str]], Path]


@pytest.fixture(scope="session")
def llama_cpp_tree() -> Path:
    """A source tree of llama.cpp, whose converter is the reference: $DOTS_ALIGN_LLAMA_CPP."""
    tree = os.environ.get("DOTS_ALIGN_LLAMA_CPP")
    if not tree or not (Path(tree) / "convert_hf_to_gguf.py").is_file():
        pytest.skip("no llama.cpp sources (set DOTS_ALIGN_LLAMA_CPP to a tree with convert_hf_to_gguf.py)")
    return Path(tree)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(checkpoint, tmp_path_factory.mktemp("out") / "model")


@pytest.fixture(scope="module")
def half(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16, in several files, with experts too narrow for the blocks of Q8_0 and with expert groups."""
    root = tmp_path_factory.mktemp("half")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = preset_config("tiny", moe_intermediate_size=48, n_group=4, topk_group=2, num_hidden_layers=2)
    model = create_model(config, 3, stop_token_ids(tokenizer)).bfloat16()
    save_model(model, tokenizer, root / "checkpoint")
    return export_hf(root / "checkpoint", root / "model", max_shard_bytes=400_000)


def values(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def convert(tree: Path, source: Path, output: Path, format: str) -> GGUFReader:
    command = [sys.executable, "-c", CONVERT, str(tree), str(source), str(output), format.lower()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return GGUFReader(output)


@pytest.mark.parametrize("source", ["exported", "half"])
@pytest.mark.parametrize("format", FORMATS)
def test_same_bytes_as_the_converter_of_llama_cpp(
    llama_cpp_tree: Path, source: str, format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(source)
    theirs = convert(llama_cpp_tree, directory, tmp_path / "theirs.gguf", format)
    ours = GGUFReader(write_gguf(directory, tmp_path / "ours.gguf", format))
    our_tensors, their_tensors = ({t.name: t for t in reader.tensors} for reader in (ours, theirs))
    assert our_tensors.keys() == their_tensors.keys()
    for name, tensor in our_tensors.items():
        assert tensor.tensor_type == their_tensors[name].tensor_type, name
        assert tensor.shape.tolist() == their_tensors[name].shape.tolist(), name
        assert tensor.data.tobytes() == their_tensors[name].data.tobytes(), name
    our_keys, their_keys = values(ours), values(theirs)
    different = {key for key in our_keys | their_keys if our_keys.get(key) != their_keys.get(key)}
    assert {key for key in different if not key.startswith("general.")} == {
        "tokenizer.ggml.bos_token_id",  # without which llama.cpp takes a comma
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.eot_token_id",
    }
    assert {key for key in different if key in our_keys and key in their_keys} == set()


def test_metadata(exported: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    found = values(GGUFReader(write_gguf(exported, tmp_path / "m.gguf", "BF16")))
    stop, end = (tokenizer.convert_tokens_to_ids(t) for t in (END_OF_RESPONSE, "<|endoftext|>"))
    expected = {
        "general.architecture": "dots1",
        "general.file_type": 32,
        "dots1.block_count": 4,
        "dots1.context_length": 2048,
        "dots1.embedding_length": 128,
        "dots1.feed_forward_length": 384,
        "dots1.expert_feed_forward_length": 64,
        "dots1.attention.head_count": 4,
        "dots1.attention.head_count_kv": 4,
        "dots1.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "dots1.rope.freq_base": 1e7,
        "dots1.expert_count": 32,
        "dots1.expert_used_count": 2,
        "dots1.expert_shared_count": 2,
        "dots1.expert_weights_scale": 2.5,
        "dots1.expert_weights_norm": True,
        "dots1.expert_gating_func": 2,
        "dots1.leading_dense_block_count": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": stop,
        "tokenizer.ggml.eot_token_id": stop,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert len(found["tokenizer.ggml.tokens"]) == 512
    assert "generation" not in found["tokenizer.chat_template"].replace("add_generation_prompt", "")


def test_router_and_vectors_stay_in_fp32(exported: Path, tmp_path: Path) -> None:
    reader = GGUFReader(write_gguf(exported, tmp_path / "m.gguf", "Q8_0"))
    exact = {t.name.split(".", 2)[-1] for t in reader.tensors if t.tensor_type == GGMLQuantizationType.F32}
    assert {"ffn_gate_inp.weight", "exp_probs_b.bias", "attn_q_norm.weight", "ffn_norm.weight"} <= exact
    assert not any(t.tensor_type == GGMLQuantizationType.F32 for t in reader.tensors if "exps" in t.name)


floats = st.lists(st.floats(-60000, 60000, width=32), min_size=32, max_size=32)


@given(floats)
@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.BF16])
def test_rounding_is_that_of_the_library(kind: GGMLQuantizationType, numbers: list[float]) -> None:
    array = np.array([numbers], np.float32)
    assert encode(torch.from_numpy(array), kind).tobytes() == quantize(array, kind).tobytes()


@pytest.mark.parametrize(
    ("value", "format", "match"),
    [
        (float("nan"), "F32", "tensor model.layers.1.mlp.experts.7.up_proj.weight is not finite"),
        (float("inf"), "Q8_0", "experts.7.up_proj.weight is not finite"),
        (70000.0, "F16", "experts.7.up_proj.weight holds 70000, too large for F16; choose BF16"),
    ],
)
def test_value_that_does_not_fit_is_refused(
    exported: Path, tmp_path: Path, value: float, format: str, match: str
) -> None:
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.experts.7.up_proj.weight"][3, 5] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "old.gguf").write_bytes(b"old")
    with pytest.raises(ValueError, match=match):
        write_gguf(broken, tmp_path / "old.gguf", format)
    assert (tmp_path / "old.gguf").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "old.gguf"]


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("model_type", "llama", "model_type is 'llama'; only dots1"),
        ("num_key_value_heads", 2, "num_key_value_heads is 2, llama.cpp's dots1 needs 4"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("attention_bias", True, "attention_bias is True"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e7}, "rope_type is 'linear'"),
        ("layer_types", ["full_attention"] * 3 + ["sliding_attention"], "layer_types is 'sliding_attention'"),
        ("vocab_size", 508, "has shape"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(
    exported: Path, edited_copy: Edit, tmp_path: Path, key: str, value: Any, match: str
) -> None:
    changed = edited_copy(exported, "config.json", lambda text: json.dumps({**json.loads(text), key: value}))
    with pytest.raises(ValueError, match=match) as error:
        write_gguf(changed, tmp_path / "m.gguf", "F32")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_missing_tensor_is_named(exported: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.gate\.e_score_correction_bias is missing"):
        write_gguf(broken, tmp_path / "m.gguf", "F32")


def test_other_tokenizer_is_refused(exported: Path, edited_copy: Edit, tmp_path: Path) -> None:
    changed = edited_copy(exported, "tokenizer.json", lambda text: text.replace(r"|\\p{N}|", r"|\\p{N}{1,3}|"))
    with pytest.raises(ValueError, match="Qwen2's splitting"):
        write_gguf(changed, tmp_path / "m.gguf", "F32")


def test_unknown_format_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown GGUF format 'Q9'; choose one of F32, F16, BF16, Q8_0"):
        write_gguf(exported, tmp_path / "m.gguf", "Q9")


MEASURE = """
import sys
from pathlib import Path
from dots_align.export import gguf
def resident(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024
small, large, format = sys.argv[1:]
gguf.write_gguf(Path(small), Path(small) / "m.gguf", format)
# Not getrusage: its peak survives exec, so it would be that of the test's own process.
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
before = resident("VmRSS")
gguf.write_gguf(Path(large), Path(large) / "m.gguf", format)
print(gguf.__file__, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak memory from Linux")
@pytest.mark.parametrize("format", ["F32", "Q8_0"])
def test_memory_does_not_grow_with_the_model(exported: Path, tmp_path: Path, format: str) -> None:
    """A model of 0.7 GB in files of 0.2 GB, whose largest tensor in the GGUF has 134 MB."""
    large = Path(shutil.copytree(exported, tmp_path / "large", ignore=shutil.ignore_patterns("*.safetensors")))
    config = preset_config(
        "tiny", hidden_size=512, moe_intermediate_size=512, n_routed_experts=128, num_hidden_layers=3
    )
    config.save_pretrained(large)
    weight_map: dict[str, str] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in expected_shapes(config).items():
        if sum(t.nbytes for t in shards[-1].values()) > 200_000_000:
            shards.append({})
        shards[-1][name] = torch.full(shape, 0.5)
        weight_map[name] = f"{len(shards)}.safetensors"
    for number, tensors in enumerate(shards, 1):
        save_file(tensors, large / f"{number}.safetensors", metadata={"format": "pt"})
    (large / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert len(shards) > 3
    command = [sys.executable, "-c", MEASURE, str(exported), str(large), format]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    module, growth = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert Path(module) == Path(gguf.__file__)
    assert 0 < int(growth) < 4 * CHUNK_BYTES
