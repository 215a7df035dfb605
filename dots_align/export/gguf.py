"""GGUF files, which llama.cpp reads: streamed from a checkpoint directory, a few rows of a tensor at a time.

The tensors are those that llama.cpp's own converter writes, byte for byte. Memory does not grow with the model: no
tensor is ever held whole.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import SafetensorError, safe_open
from transformers import Dots1Config

from dots_align.export.gguf_metadata import add_metadata, check_convertible
from dots_align.export.weights import check_tensors, expected_shapes
from dots_align.runtime import logger, progress

FORMATS = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
# As fp32; a row of the widest matrix of dots.llm1 takes 44 kB.
CHUNK_BYTES = 32 * 2**20
_EXPERT = re.compile(r"\.experts\.\d+\.")
_TORCH_DTYPES = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the GGUF: `sources` of the checkpoint, one after the other on a leading dimension if several."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        return math.prod(quant_shape_to_byte_shape(self.shape, self.kind))


def write_gguf(directory: Path, output: Path, format: str) -> Path:
    """Writes the model and tokenizer of a full checkpoint directory as one GGUF file, whole or not at all.

    Args:
        directory: weights under the hub's names (safetensors, sharded or not), config and tokenizer.
        output: the file to write; one that is there is replaced.
        format: one of FORMATS. Vectors and the router stay F32 in each; where rows do not fill the blocks of Q8_0
            (32 values) the tensor is F16, as llama.cpp's converter does.

    Returns:
        `output`.

    Raises:
        ValueError: the format is unknown, the directory is damaged or holds what llama.cpp's dots1 cannot express, or
        a value is not finite in the format.
    """
    directory, output = Path(directory), Path(output)
    if format not in FORMATS:
        raise ValueError(f"unknown GGUF format {format!r}; choose one of {', '.join(FORMATS)}")
    try:
        config = read_config(directory)
        check_convertible(directory, config)
        files = check_tensors(directory, config)
        tensors = _plan(config, GGMLQuantizationType[format])
        unfit = [t for t in tensors if t.kind == GGMLQuantizationType.F16] if format == "Q8_0" else []
        if unfit:
            logger.warning(
                "%d tensors are stored as F16: rows of %d do not fill blocks", len(unfit), unfit[0].shape[-1]
            )
        with _published(output) as staging:
            _write_header(directory, config, tensors, FORMATS[format], staging)
            _write_tensors(directory, files, tensors, staging)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory}: cannot be written as GGUF: {error}") from None
    logger.info("wrote %s (%.1f MB, %d tensors)", output.name, output.stat().st_size / 1e6, len(tensors))
    return output


def read_config(directory: Path) -> Dots1Config:
    """The configuration in a directory; ValueError if it is not one of a dots1."""
    path = directory / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if kind != "dots1":
        raise ValueError(f"{path}: model_type is {kind!r}; only dots1 can be written as GGUF")
    return Dots1Config.from_pretrained(directory, local_files_only=True)


# ---------------------------------------------------------------------------------------------------------------- plan


def _plan(config: Dots1Config, kind: GGMLQuantizationType) -> list[_Tensor]:
    """The tensors of the file, in its order; the experts of a layer and projection become one."""
    shapes = expected_shapes(config)
    groups: dict[str, list[str]] = {}
    for source in shapes:
        groups.setdefault(_EXPERT.sub(".experts.", source), []).append(source)
    names = get_tensor_name_map(MODEL_ARCH.DOTS1, config.num_hidden_layers)
    tensors = []
    for merged, sources in groups.items():
        name = _gguf_name(names, merged)
        stacked = [len(sources)] if merged != sources[0] else []
        shape = (*stacked, *shapes[sources[0]])
        tensors.append(_Tensor(name, tuple(sources), shape, _kind(name, shape, kind)))
    return tensors


def _gguf_name(names: TensorNameMap, name: str) -> str:
    found = names.get_name(name.replace("e_score_correction_bias", "e_score_correction.bias"), (".weight", ".bias"))
    assert found is not None, name
    return found


def _kind(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """How a tensor is stored. llama.cpp computes with vectors in F32 only; the router decides near-ties."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if shape[-1] % block else wanted


# --------------------------------------------------------------------------------------------------------------- write


@contextmanager
def _published(output: Path) -> Iterator[Path]:
    """A path to write to, which becomes `output` once its content is on disk; nothing is left after an error."""
    staging = output.with_name(f".{output.name}.staging")
    try:
        yield staging
        with staging.open("rb") as stream:
            os.fsync(stream.fileno())
        staging.replace(output)
    finally:
        staging.unlink(missing_ok=True)


def _write_header(
    directory: Path, config: Dots1Config, tensors: list[_Tensor], file_type: LlamaFileType, path: Path
) -> None:
    """Everything before the data. The writer's own way of adding data wants whole tensors in memory."""
    writer = GGUFWriter(path, "dots1")
    for tensor in tensors:
        unused = np.dtype(np.float32)  # as the kind is given
        writer.add_tensor_info(tensor.name, tensor.shape, unused, tensor.num_bytes, raw_dtype=tensor.kind)
    add_metadata(writer, directory, config, file_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(directory: Path, files: dict[str, Path], tensors: list[_Tensor], path: Path) -> None:
    """Appends the data of each tensor at the alignment that the header's offsets presume."""
    with path.open("ab") as stream, progress(len(tensors), "writing GGUF", "tensor") as bar:
        for tensor in tensors:
            _pad(stream)
            start = stream.tell()
            for source in tensor.sources:
                for rows in _rows(files[source], source):
                    try:
                        stream.write(encode(rows, tensor.kind).data)
                    except ValueError as error:
                        raise ValueError(f"{directory}: tensor {source} {error}") from None
            assert stream.tell() - start == tensor.num_bytes, tensor.name
            bar.update()
        _pad(stream)


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % GGUF_DEFAULT_ALIGNMENT))


def _rows(path: Path, name: str) -> Iterator[torch.Tensor]:
    """The tensor in slices of its first dimension. The file is closed after each tensor, or its pages stay resident."""
    with safe_open(path, framework="pt") as shard:
        view = shard.get_slice(name)
        count, *width = view.get_shape()
        step = max(1, CHUNK_BYTES // (4 * math.prod(width)))
        for start in range(0, count, step):
            yield view[start : start + step]


def encode(values: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Values as the file holds them: the last dimension becomes blocks of bytes where `kind` has blocks.

    Raises:
        ValueError: a value is not finite, or not any more in `kind`; the message continues the tensor's name.
    """
    dtype = _TORCH_DTYPES.get(kind, torch.float32)
    stored = values.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        worst = values.float().abs().max().item()
        reason = f"holds {worst:g}, too large for {kind.name}; choose BF16" if math.isfinite(worst) else "is not finite"
        raise ValueError(reason)
    if kind in _TORCH_DTYPES:
        return stored.contiguous().view(torch.int16).numpy()
    return quantize(stored.contiguous().numpy(), kind)
