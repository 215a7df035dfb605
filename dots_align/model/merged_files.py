"""The weights in the files of a checkpoint; an adapter is folded into those of its base, one tensor at a time.

`lora.merge_adapter` does the same to a whole model in memory.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dots_align.model.dots1 import meta_model
from dots_align.model.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterParameter,
    adapter_base,
    adapter_parameters,
    add_adapter,
    check_adapter_file,
    named_base,
    stored_lora,
)
from dots_align.model.sharded_io import HubFiles

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# Of PEFT's adapters: what makes one more than B A, scaled.
_BEYOND = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "modules_to_save")


def open_weights(directory: Path) -> HubFiles:
    """The weights of a full or adapter checkpoint directory, in the hub's layout."""
    return HubFiles(directory) if adapter_base(directory) is None else MergedFiles(directory)


class MergedFiles(HubFiles):
    """Slices of the tensors of an adapter's base with the adapter, and those it was trained on, folded in.

    The memory it takes does not grow with the model: the part asked for, and B of one layer's experts.

    Raises:
        ValueError: a base or an adapter tensor is missing or unexpected, or an adapter is more than plain LoRA.
    """

    def __init__(self, directory: Path) -> None:
        base = adapter_base(directory)
        assert base is not None, directory
        super().__init__(base)
        self._adapters = [_Adapter(adapter, base) for adapter in _chain(directory)]

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> torch.Tensor:
        return self.fold(name, super().read(name, shape, part), part)

    def fold(self, name: str, tensor: torch.Tensor, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """Adds what the adapters add to `part` (all, if empty) of the hub's tensor `name`.

        Returns:
            `tensor` itself if no adapter touches it; else a new one in at least fp32, for the caller to round.
        """
        for adapter in self._adapters:
            if (update := adapter.update(name, part)) is not None:
                tensor = update.add_(tensor)
        return tensor


def _chain(directory: Path) -> list[Path]:
    """An adapter directory, after the one it was trained on, and so on; the one on the full checkpoint comes first."""
    below, _ = named_base(directory)
    assert below is not None, directory
    return [*(_chain(below) if (below / ADAPTER_CONFIG).is_file() else []), directory]


class _Adapter:
    """The updates in one adapter's file."""

    def __init__(self, directory: Path, base: Path) -> None:
        fields = _plain_fields(directory)
        lora = stored_lora(directory)
        self.r = lora.r
        self.scaling = lora.lora_alpha / (math.sqrt(lora.r) if fields.get("use_rslora") else lora.r)
        model = add_adapter(meta_model(base, "float32", "packed", "grouped"), lora, str(base))
        parameters = list(adapter_parameters(model))
        path = directory / ADAPTER_WEIGHTS
        self._file: Any = safe_open(path, framework="pt")
        check_adapter_file(path, self._file, {p.key: p.file_shape for p in parameters})
        self._parameters = {(_weight_name(p), p.part): p for p in parameters}
        self._kept: dict[str, torch.Tensor] = {}

    def update(self, name: str, part: tuple[slice, ...]) -> torch.Tensor | None:
        """scaling * B A for `part` (all, if empty) of the hub's tensor `name`; None if it is not adapted."""
        expert = _EXPERT.fullmatch(name)
        weight = name if expert is None else f"{expert[1]}.{'down_proj' if expert[3] == 'down' else 'gate_up_proj'}"
        if (weight, "lora_A") not in self._parameters:
            return None
        rows, columns = part or (slice(None), slice(None))
        stored_a, stored_b = (self._parameters[weight, side] for side in ("lora_A", "lora_B"))
        if expert is None:
            a, b = self._file.get_slice(stored_a.key)[:, columns], self._file.get_slice(stored_b.key)[rows]
        else:
            number = int(expert[2])
            a = self._file.get_slice(stored_a.key)[number * self.r : (number + 1) * self.r, columns]
            b = self._whole(stored_b)[number]
            if expert[3] != "down":  # rows [0, I) are the gate's, [I, 2I) those of up
                b = b.chunk(2)[expert[3] == "up"]
            b = b[rows]
        return (b.float() @ a.float()).mul_(self.scaling)

    def _whole(self, stored: AdapterParameter) -> torch.Tensor:
        """[E, out, r]. The two B of a layer are kept while its experts go by, whose columns lie all over the file."""
        if stored.key not in self._kept:
            self._kept = dict([*self._kept.items()][-1:])
            self._kept[stored.key] = stored.from_file(self._file.get_tensor(stored.key))
        return self._kept[stored.key]


def _plain_fields(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    fields = json.loads(path.read_text(encoding="utf-8"))
    beyond = [key for key in _BEYOND if fields.get(key)]
    if fields.get("bias", "none") != "none":
        beyond.append("bias")
    beyond += [key for key in ("target_modules", "target_parameters") if isinstance(fields.get(key), str)]
    if beyond:
        raise ValueError(
            f"{path}: {beyond[0]}={fields[beyond[0]]!r} makes it more than plain LoRA, which is all that is merged "
            "tensor by tensor; merge it with PEFT (merge_and_unload) and take the result"
        )
    return fields


def _weight_name(parameter: AdapterParameter) -> str:
    """The weight of the bare model (experts fused) that an adapter parameter belongs to."""
    name = parameter.name.removeprefix("base_model.model.")
    return re.sub(rf"(\.lora)?\.lora_[AB]\.{ADAPTER}\.", ".", name)
