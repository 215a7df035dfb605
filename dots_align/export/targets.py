"""`dots-align export`: one checkpoint as a directory for transformers, as GGUF files for llama.cpp, or as both."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dots_align.checkpoint import check_whole, stored_dtype
from dots_align.export.gguf import FORMATS, read_config, write_gguf
from dots_align.export.gguf_metadata import check_convertible
from dots_align.export.hf import MAX_SHARD_BYTES, export_hf
from dots_align.export.verify import ask_fresh_process, verify_export
from dots_align.export.verify_gguf import verify_gguf
from dots_align.model.lora import adapter_base

HF = "hf"
# Made by llama.cpp's quantizer, from a file of ours.
K_QUANTS = ("Q6_K", "Q5_K_M", "Q4_K_M")
TARGETS = (HF, *(f"gguf:{format}" for format in (*FORMATS, *K_QUANTS)))
QUANTIZER_BYTES = 2**30
_QUANTIZE = Path(__file__).with_name("quantize_gguf.py")


def export(
    checkpoint: Path,
    output: Path,
    overwrite: bool = False,
    targets: Sequence[str] = (HF,),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Exports a checkpoint, published only once fresh processes that load the result have answered like it.

    Args:
        checkpoint: a full or adapter checkpoint directory; an adapter is merged first.
        output: the directory to make.
        overwrite: replace an earlier export there; nothing else is ever replaced.
        targets: of TARGETS. A GGUF file is written from the finished HF directory and stays in it, as
            model-Q8_0.gguf; without `hf` the rest of that directory is removed again, but it takes its space meanwhile.
        max_shard_bytes: safetensors beyond it are split into several files.

    Returns:
        `output`.

    Raises:
        ValueError: a target is unknown, or as `export_hf`, `verify_export`, `write_gguf` and `verify_gguf`; nothing is
        published then.
    """
    checkpoint, formats = Path(checkpoint), gguf_formats(targets)
    quantized = [format for format in formats if format in K_QUANTS]
    if quantized and importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(
            f"gguf:{quantized[0]} is made by llama.cpp's quantizer, which is not installed: pip install "
            "'dots-align[llama]'; gguf:Q8_0 needs nothing"
        )
    if formats:
        check_whole(checkpoint)
        source = adapter_base(checkpoint) or checkpoint
        check_convertible(source, read_config(source))  # before gigabytes are copied

    def finish(directory: Path) -> dict[str, Any]:
        found: dict[str, Any] = {"verification": verify_export(checkpoint, directory)}
        files = {format: directory / f"model-{format}.gguf" for format in formats}
        for format in formats:
            if format not in K_QUANTS:
                write_gguf(directory, files[format], format)
        if quantized:
            _quantize(directory, {format: files[format] for format in quantized})
        if files:
            found["gguf"] = verify_gguf(checkpoint, files)
        if HF not in targets:
            for path in set(directory.iterdir()) - set(files.values()):
                path.unlink()
        return found

    return export_hf(checkpoint, output, overwrite, max_shard_bytes, finish)


def _quantize(directory: Path, files: dict[str, Path]) -> None:
    """Writes each file from one in full precision, which is removed again."""
    source = directory / ".full.gguf"
    write_gguf(directory, source, "BF16" if stored_dtype(directory) == "bfloat16" else "F32")
    request = {"source": str(source), "threads": torch.get_num_threads(), "buffer_bytes": QUANTIZER_BYTES}
    try:
        for format, path in files.items():
            asked = {**request, "output": str(path), "format": format}
            ask_fresh_process(_QUANTIZE, asked, f"{path}: llama.cpp cannot quantize the model")
    finally:
        source.unlink()


def gguf_formats(targets: Sequence[str]) -> list[str]:
    """The GGUF formats among the targets, each once.

    Raises:
        ValueError: there is no target, or one that is not of TARGETS.
    """
    for target in targets or [""]:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; choose from {', '.join(TARGETS)}")
    return [target.partition(":")[2] for target in dict.fromkeys(targets) if target != HF]
