"""A deployable chat checkpoint: the hub's tensor names, and JSON for transformers 4.57 and 5, vLLM, SGLang, llama.cpp.

What is written loads without dots_align. It is published whole or not at all; targets.py also proves it before that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, Dots1Config, Dots1ForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from dots_align.checkpoint import MANIFEST, check_whole, staged
from dots_align.data.chat import stop_token_ids
from dots_align.export.card import model_card
from dots_align.export.curves import FILE, draw
from dots_align.export.source import History, training_history
from dots_align.export.template import portable_template
from dots_align.export.weights import INDEX, check_tensors, weight_files
from dots_align.model.dots1 import count_parameters
from dots_align.model.lora import adapter_base
from dots_align.model.merged_files import MergedFiles
from dots_align.runtime import logger, write_json

EXPORT_STAGE = "export"
MAX_SHARD_BYTES = 5 * 10**9
CORRECTION_BIAS = "e_score_correction_bias"
# Completes the finished files before they are published; what it returns is kept in the manifest.
Finish = Callable[[Path], dict[str, Any]]


def export_hf(
    checkpoint: Path,
    output: Path,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finish: Finish | None = None,
) -> Path:
    """Writes a checkpoint (an adapter is merged into its base) as a directory that others can load.

    Args:
        checkpoint: a full or adapter checkpoint directory; an earlier export will do.
        output: the directory to make.
        overwrite: replace an earlier export there; nothing else is ever replaced.
        max_shard_bytes: weights beyond it are split into several files.
        finish: called with the complete, not yet published directory, to prove it or to change it.

    Returns:
        `output`.

    Raises:
        ValueError: the checkpoint is damaged or lacks a tensor, or `output` holds something else.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_whole(checkpoint)
    check_output(checkpoint, output, overwrite)
    # Written by `staged` after the block below, so what is found out in it is still taken in.
    history = training_history(checkpoint)
    manifest = {"stage": EXPORT_STAGE, "step": last_step(history), "training": history.as_dict()}
    with staged(output.resolve(), manifest) as staging:
        _write_model_files(checkpoint, staging, max_shard_bytes)
        config = Dots1Config.from_pretrained(staging)
        if finish is not None:
            manifest |= finished(finish, staging, output)
        proofs = manifest.get("verification"), manifest.get("gguf")
        card = model_card(config, parameter_counts(config), history, *proofs, hf=(staging / "config.json").is_file())
        (staging / "README.md").write_text(card, encoding="utf-8")
        if (drawing := draw([(s.stage, s.curves) for s in history.stages])) is not None:
            (staging / FILE).write_text(drawing, encoding="utf-8")
    logger.info("exported %s to %s", checkpoint, output)
    return output


def finished(finish: Finish, staging: Path, output: Path) -> dict[str, Any]:
    """Its message names the directory the caller asked for, as the staging directory will be gone."""
    try:
        return finish(staging)
    except ValueError as error:
        raise ValueError(f"{str(error).replace(str(staging), str(output))} (nothing was exported)") from None


def check_output(checkpoint: Path, output: Path, overwrite: bool) -> None:
    target = output.resolve()
    for source in (checkpoint.resolve(), (adapter_base(checkpoint) or checkpoint).resolve()):
        if source == target or source in target.parents or target in source.parents:
            raise ValueError(f"{output}: is, holds or lies in {source}, the source; choose another output directory")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not _is_export(target):
        raise ValueError(f"{output}: exists and is not an export; choose another output directory")
    if not overwrite:
        raise ValueError(f"{output}: holds an earlier export; choose another output directory, or give --overwrite")


def _is_export(directory: Path) -> bool:
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["stage"] == EXPORT_STAGE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def last_step(history: History) -> int:
    return history.stages[-1].step if history.stages else 0


def _write_model_files(checkpoint: Path, staging: Path, max_shard_bytes: int) -> None:
    """Everything that a loader reads: weights, config, generation config, tokenizer."""
    base = adapter_base(checkpoint)
    try:
        config = Dots1Config.from_pretrained(base or checkpoint, local_files_only=True)
        # transformers would fill a missing tensor with fresh values and go on.
        check_tensors(base or checkpoint, config)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        merged = None if base is None else MergedFiles(checkpoint)
        _copy_weights(base or checkpoint, staging, max_shard_bytes, merged)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{checkpoint}: cannot be read: {error}") from None
    write_tokenizer(tokenizer, staging)
    _write_config(config, tokenizer, staging)
    write_generation_config(base or checkpoint, tokenizer, staging)


# ------------------------------------------------------------------------------------------------------------- weights


def _copy_weights(source: Path, staging: Path, max_shard_bytes: int, merged: MergedFiles | None) -> None:
    """Copies tensors, bit by bit but for what an adapter adds, into shards of at most `max_shard_bytes`; one shard at a
    time is in memory.
    """
    shards = _plan_shards(weight_files(source), max_shard_bytes)
    weight_map, total = {}, 0
    for number, members in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(_read(members, merged))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
        try:
            save_file(tensors, staging / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ValueError(f"{name}: cannot be written: {error}") from None
    if len(shards) > 1:
        write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _plan_shards(files: list[Path], max_shard_bytes: int) -> list[list[tuple[Path, str]]]:
    """Which (file, tensor) goes into which shard, in the order of the source."""
    shards: list[list[tuple[Path, str]]] = [[]]
    room = max_shard_bytes
    for path in files:
        for name, size in _sizes(path).items():
            if shards[-1] and size > room:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append((path, name))
            room -= size
    return shards


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, from the header alone (8 bytes of its length, then JSON)."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


def _read(members: list[tuple[Path, str]], merged: MergedFiles | None) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted({path for path, _ in members}):
        with safe_open(path, framework="pt") as shard:
            for name in (name for owner, name in members if owner == path):
                tensor = shard.get_tensor(name)
                if merged is not None:
                    tensor = merged.fold(name, tensor).to(tensor.dtype)
                # The bias decides near-ties between experts: the hub keeps it in fp32 whatever the rest is in.
                yield name, tensor.float() if name.endswith(CORRECTION_BIAS) else tensor


def parameter_counts(config: Dots1Config) -> tuple[int, int]:
    """(all, active per token) parameters."""
    with torch.device("meta"):
        return count_parameters(Dots1ForCausalLM(config))


# ---------------------------------------------------------------------------------------------------------- JSON files


def _write_config(config: Dots1Config, tokenizer: PreTrainedTokenizerBase, staging: Path) -> None:
    """config.json with the fields that other readers take from its top level, and do not guess right without."""
    config.save_pretrained(staging)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    path = staging / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    dtype = str(fields.pop("dtype", None) or "float32")
    fields |= {
        "architectures": ["Dots1ForCausalLM"],
        "dtype": dtype,
        "torch_dtype": dtype,  # the name that readers before transformers 5 know
        # transformers 4.57 does not know rope_parameters and silently takes 10000.
        "rope_theta": rope["rope_theta"],
        # vLLM reads these three unguarded; llama.cpp's converter stops without the first.
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "head_dim": config.head_dim,
        "use_sliding_window": False,
        # null crashes transformers 5.10; 1 of 1 groups is what null meant.
        "n_group": config.n_group or 1,
        "topk_group": config.topk_group or 1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "use_cache": True,  # trainers switch it off, and generation would then be quadratic
    }
    fields.pop("_name_or_path", None)
    write_json(path, dict(sorted(fields.items())))


def write_generation_config(source: Path, tokenizer: PreTrainedTokenizerBase, staging: Path) -> None:
    """Stops at every token that ends a turn; the source's sampling defaults, if it has any, are kept."""
    path = source / "generation_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"do_sample": False}
    for name in ("_from_model_config", "_name_or_path", "transformers_version", "bos_token_id"):
        fields.pop(name, None)
    fields |= {"eos_token_id": list(stop_token_ids(tokenizer)), "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig(**fields).save_pretrained(staging)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, staging: Path) -> None:
    """Tokenizer files in the terms of transformers 4, which transformers 5 still reads."""
    tokenizer.chat_template = template = portable_template(tokenizer.get_chat_template())
    tokenizer.save_pretrained(staging)
    core = json.loads((staging / "tokenizer.json").read_text(encoding="utf-8"))
    path = staging / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5's own notes of how it was loaded, and what may hold a path of this machine.
    for name in ("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file"):
        fields.pop(name, None)
    extra = fields.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        fields["additional_special_tokens"] = extra
    elif extra:
        fields["extra_special_tokens"] = extra
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    fields |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(t["id"]): {flag: t[flag] for flag in flags} for t in core["added_tokens"]},
        # dots.llm1 has no BOS. llama.cpp takes id 11, a comma, where nobody says so.
        "bos_token": None,
        "add_bos_token": False,
        "chat_template": template,
    }
    write_json(path, fields)
