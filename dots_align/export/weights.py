"""The weights of a checkpoint directory in the hub's layout: which tensors there have to be, and in which files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import Dots1Config, Dots1ForCausalLM

INDEX = "model.safetensors.index.json"


def expected_shapes(config: Dots1Config) -> dict[str, list[int]]:
    """The hub's tensor names, one tensor per expert and projection, with their shapes."""
    with torch.device("meta"):
        state = Dots1ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    shapes: dict[str, list[int]] = {}
    width, hidden, num_experts = config.moe_intermediate_size, config.hidden_size, config.n_routed_experts
    assert num_experts is not None
    for name, tensor in state.items():
        prefix, _, fused = name.rpartition(".")
        if fused == "gate_up_proj":
            for expert in range(num_experts):
                shapes[f"{prefix}.{expert}.gate_proj.weight"] = [width, hidden]
                shapes[f"{prefix}.{expert}.up_proj.weight"] = [width, hidden]
                shapes[f"{prefix}.{expert}.down_proj.weight"] = [hidden, width]
        elif not prefix.endswith(".experts"):
            shapes[name] = list(tensor.shape)
    return shapes


def check_tensors(directory: Path, config: Dots1Config) -> dict[str, Path]:
    """The file of each tensor.

    Raises:
        ValueError: the weights in the directory are not exactly those its config asks for.
    """
    expected, found, files = expected_shapes(config), {}, {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                found[name], files[name] = shard.get_slice(name).get_shape(), path
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    for problem, names in (("is missing", missing), ("is unknown", unknown)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{directory}: tensor {min(names)} {problem}{more}; the weights do not fit config.json")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{directory}: tensor {name} has shape {found[name]}, config.json asks for {shape}")
    return files


def weight_files(directory: Path) -> list[Path]:
    """The files a loader would read: those the index names, or the one there is."""
    index = directory / INDEX
    if not index.is_file():
        return [directory / "model.safetensors"]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [directory / name for name in sorted(set(names))]
