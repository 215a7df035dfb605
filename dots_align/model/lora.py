"""LoRA adapters, the one place that imports PEFT.

Linear layers get PEFT's own LoRA layers. The routed experts, which transformers fuses into three-dimensional
parameters, get an `ExpertAdapter`: PEFT would build the whole [E, out, in] update in every forward, and cannot do so on
shards. Files are PEFT's: what is saved here loads in plain PEFT on plain transformers and gives the same outputs.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dots_align.config import LoraSection
from dots_align.model.dots1 import lm_head
from dots_align.model.experts import IMPLEMENTATION, grouped_linear, local
from dots_align.model.heads import has_scalar_head
from dots_align.model.sharded_io import SCORE_HEAD
from dots_align.runtime import is_main_process

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
REWARD_MODEL_TASK = "SEQ_CLS"  # PEFT's name of what a reward model does
ADAPTER = "default"  # PEFT's name of an adapter within a model; it does not appear in files
# PEFT 0.21 turns these names in `target_modules` of a model whose experts transformers fuses into the routed experts
# (`_convert_peft_config_moe`), wherever they occur. Named as parameters, `down_proj.weight`, it leaves them alone.
_REWRITTEN = ("gate_proj", "up_proj", "down_proj")
_BASE = "base_model.model"  # where PEFT keeps the model

# Maps a parameter, possibly sharded, to the whole tensor on the CPU. Collective: called for the same parameters in the
# same order on every rank.
Gather = Callable[[torch.Tensor], torch.Tensor]
# Writes a whole tensor, or a rank's part of it, into a parameter.
Place = Callable[[nn.Parameter, torch.Tensor], None]


class ExpertAdapter(nn.Module, BaseTunerLayer):
    """LoRA on the routed experts of one layer: for each weight [E, out, in] it adapts, A [E, r, in] and B [E, out, r].

    It lies on the experts module as `experts.lora`, where the `grouped` implementation finds it. As a tuner layer of
    PEFT it is switched off and on, and frozen, with the others.
    """

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, weights: dict[str, nn.Parameter], r: int, lora_alpha: int) -> None:
        """`weights` are the experts' own parameters, by name; the adapter is on their device and at least fp32."""
        super().__init__()
        self.scaling = lora_alpha / r
        a, b = {}, {}
        for name, weight in weights.items():
            num_experts, out_features, in_features = weight.shape
            options: Any = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
            a[name] = nn.Parameter(torch.zeros(num_experts, r, in_features, **options))
            b[name] = nn.Parameter(torch.zeros(num_experts, out_features, r, **options))
        # As pairs: of a plain dict ParameterDict would sort the names, and their order is part of PEFT's file.
        self.lora_A = nn.ModuleDict({ADAPTER: nn.ParameterDict(list(a.items()))})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.ParameterDict(list(b.items()))})

    def get_base_layer(self) -> nn.Module:
        """There is none: the adapter lies beside the weights, around nothing. PEFT's default would answer with the
        adapter itself, whose `weight` it would then look up for ever.
        """
        raise AttributeError("an ExpertAdapter wraps no layer")

    def adapted(self) -> list[str]:
        """Names of the weights it adapts, in the order of the experts module."""
        return list(self._part("lora_A"))

    def _part(self, part: str) -> Any:
        return getattr(self, part)[ADAPTER]

    def delta(self, name: str, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the product of `rows` with the weight `name`, in the dtype of `rows`.

        Args:
            rows: [M, in], sorted by expert. counts: [E] rows of each expert (expert parallelism: of each own expert).

        Returns:
            [M, out]; a scalar zero for a weight that is not adapted.
        """
        if name not in self._part("lora_A"):
            return rows.new_zeros(())
        a, b = (local(self._part(part)[name]) for part in self.adapter_layer_names)
        return grouped_linear(grouped_linear(rows, counts, a) * self.scaling, counts, b)


class AdaptedModel(PeftModelForCausalLM):
    """A PEFT model that saves and loads the routed experts' adapters with the others."""

    def save_pretrained(self, save_directory: Any, *_: Any, **options: Any) -> None:
        """`save_adapter`, as transformers' Trainer calls it: on the main process alone, with `state_dict` where the
        parameters themselves are sharded.
        """
        tensors = options.get("state_dict")
        if tensors is None:
            save_adapter(self, Path(save_directory), is_main=options.get("is_main_process"))
        else:
            whole = {s.key: s.to_file(_cpu(tensors[s.name])) for s in adapter_parameters(self)}
            _write(self, Path(save_directory), whole)

    def load_adapter(self, model_id: Any, adapter_name: str, *_: Any, **__: Any) -> None:
        """`load_adapter_weights`, as transformers' Trainer calls it to resume."""
        assert adapter_name == ADAPTER
        load_adapter_weights(self, Path(model_id))

    def add_adapter(self, adapter_name: str, *_: Any, **__: Any) -> None:
        """TRL's DPO asks for a frozen copy, "ref", of the adapter it is given. A stage begins with an adapter that adds
        nothing, so the model with adapters off, which DPO falls back to, is that reference without the memory.
        """
        trained = any(local(s.parameter).any() for s in adapter_parameters(self) if s.part == "lora_B")
        if adapter_name != "ref" or trained:
            raise ValueError(
                f"a second adapter, {adapter_name!r}, is not supported; merge the first one and go on from it"
            )

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter itself where DPO fills its copy."""
        return super().get_parameter(target.replace(".ref.", f".{ADAPTER}."))


def add_adapter(model: PreTrainedModel, lora: LoraSection, base_path: str, seed: int = 0) -> AdaptedModel:
    """Wraps a model, real or on meta, with fresh adapters; everything else is frozen, but for the head of a reward
    model, which no language model brings: it is trained and stored with the adapters.

    `lora.target_modules` are suffixes of names of linear layers: `down_proj` means the dense layers' and the shared
    experts', `shared_experts.down_proj` only the latter's. The routed experts, `mlp.experts.down_proj`, are reached by
    `lora.target_parameters` alone.

    Args:
        base_path: what the adapter will name as its base. seed: of the initial values (`initialise_adapter`).

    Raises:
        ValueError: a target matches nothing, so that training would silently leave it out; the experts' implementation
        would leave the adapter out; or PEFT could not load the result.
    """
    linears, routed = _targets(model, lora)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=DUMMY_TARGET_MODULES,  # PEFT's matching would rewrite the names: the layers are placed below
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
    )
    adapted = AdaptedModel(model, config)
    for name in linears:
        path, _, leaf = name.rpartition(".")
        parent: Any = model.get_submodule(path)
        setattr(parent, leaf, LoraLinear(getattr(parent, leaf), ADAPTER, config, r=lora.r, lora_alpha=lora.lora_alpha))
    for path in dict.fromkeys(name.rpartition(".")[0] for name in routed):
        experts: Any = model.get_submodule(path)
        weights = {n: p for n, p in experts.named_parameters(recurse=False) if f"{path}.{n}" in routed}
        experts.lora = ExpertAdapter(weights, lora.r, lora.lora_alpha)
    cast_adapter_dtype(adapted, ADAPTER)  # at least fp32, as PEFT does by default
    rewritten = [t for t in lora.target_modules if t.rpartition(".")[2] in _REWRITTEN]
    config.target_modules = sorted(set(lora.target_modules) - set(rewritten))
    config.target_parameters = sorted({*lora.target_parameters, *(f"{t}.weight" for t in rewritten)})
    if has_scalar_head(model):
        config.task_type, config.modules_to_save = REWARD_MODEL_TASK, [SCORE_HEAD.removesuffix(".weight")]
        lm_head(model).weight.requires_grad_(True)
    if not any(s.parameter.is_meta for s in adapter_parameters(adapted)):
        initialise_adapter(adapted, seed)
    return adapted


def _targets(model: PreTrainedModel, lora: LoraSection) -> tuple[list[str], list[str]]:
    """Full names of the linear layers and of the routed experts' weights to adapt, in the order of the model."""
    head = lm_head(model)  # used without its forward: an adapter on it would never train
    linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    routed = [n for n, p in model.named_parameters() if n.rpartition(".")[0].endswith("mlp.experts") and p.dim() == 3]
    layers = _listed(n.rpartition(".")[2] for n in linears)
    weights = _listed(".".join(n.split(".")[-3:]) for n in routed)
    chosen_linears = _match("target_modules", lora.target_modules, linears, f"linear layer; there are {layers}")
    chosen_routed = _match(
        "target_parameters", lora.target_parameters, routed, f"routed experts' weight; there are {weights}"
    )
    if not chosen_linears and not chosen_routed:
        raise ValueError("lora: neither target_modules nor target_parameters names anything to train")
    if chosen_routed and model.config._experts_implementation != IMPLEMENTATION:
        raise ValueError(
            f"lora.target_parameters: with model.experts_implementation={model.config._experts_implementation} the "
            "routed experts' adapters would be left out silently; set model.experts_implementation=grouped"
        )
    narrow = [*chosen_routed, *(n for n in chosen_linears if n.rpartition(".")[2] in _REWRITTEN)]
    if lora.lora_dropout and narrow:
        raise ValueError(
            f"lora.lora_dropout={lora.lora_dropout}: PEFT could not load an adapter with dropout on {narrow[0]}; set "
            "it to 0, or target attention only"
        )
    return chosen_linears, chosen_routed


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _match(key: str, targets: tuple[str, ...], names: list[str], what: str) -> list[str]:
    for target in targets:
        if not any(_is_suffix(target, name) for name in names):
            hint = "; routed experts are named in lora.target_parameters" if "experts." in target else ""
            raise ValueError(f"lora.{key}: {target!r} matches no {what}{hint if key == 'target_modules' else ''}")
    return [name for name in names if any(_is_suffix(target, name) for target in targets)]


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


# ------------------------------------------------------------------------------------------------- parameters and files


@dataclass(frozen=True)
class AdapterParameter:
    """One adapter parameter: its name in the model, its key and layout in PEFT's file."""

    name: str
    key: str
    part: str  # lora_A, lora_B or head
    parameter: nn.Parameter

    @property
    def file_shape(self) -> tuple[int, ...]:
        """[r, in] or [out, r]; for E experts [E * r, in], expert by expert, or [out, r * E], rank by rank."""
        if self.parameter.dim() == 2:
            return tuple(self.parameter.shape)
        num_experts, rows, columns = self.parameter.shape
        return (num_experts * rows, columns) if self.part == "lora_A" else (rows, columns * num_experts)

    def to_file(self, whole: torch.Tensor) -> torch.Tensor:
        if whole.dim() == 3:
            whole = whole.flatten(0, 1) if self.part == "lora_A" else whole.permute(1, 2, 0).flatten(1)
        return whole.contiguous()

    def from_file(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.parameter.dim() == 2:
            return tensor
        num_experts, rows, columns = self.parameter.shape
        if self.part == "lora_A":
            return tensor.view(num_experts, rows, columns)
        return tensor.view(rows, columns, num_experts).permute(2, 0, 1)


def adapter_parameters(model: nn.Module) -> Iterator[AdapterParameter]:
    """All adapter parameters, in the order of the model."""
    for path, module in model.named_modules():
        if isinstance(module, ExpertAdapter):
            # PEFT wraps a module once for each parameter it adapts there, the last one outermost.
            for depth, weight in enumerate(reversed(module.adapted())):
                owner = path.removesuffix(".lora") + ".base_layer" * depth
                for part in module.adapter_layer_names:
                    parameter = module._part(part)[weight]
                    name, key = f"{path}.{part}.{ADAPTER}.{weight}", f"{owner}.{part}.weight"
                    yield AdapterParameter(name, key, part, parameter)
        elif isinstance(module, LoraLinear):
            for part in ("lora_A", "lora_B"):
                parameter = getattr(module, part)[ADAPTER].weight
                yield AdapterParameter(f"{path}.{part}.{ADAPTER}.weight", f"{path}.{part}.weight", part, parameter)
    if has_scalar_head(model):
        head: Any = model.get_submodule(f"{_BASE}.lm_head")
        yield AdapterParameter(f"{_BASE}.lm_head.weight", f"{_BASE}.{SCORE_HEAD}", "head", head.weight)


def _cpu(parameter: torch.Tensor) -> torch.Tensor:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu()


def _copy(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(whole)


def initialise_adapter(model: nn.Module, seed: int, place: Place = _copy) -> None:
    """Gives every adapter parameter its initial value, as PEFT does: A uniform within 1 / sqrt(in), B zero.

    The values depend on the seed and the model alone, not on how it is sharded. A reward model's head is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for stored in adapter_parameters(model):
        if stored.part == "head":
            continue
        value = torch.zeros(stored.file_shape)
        if stored.part == "lora_A":
            bound = 1 / math.sqrt(stored.file_shape[1])
            value.uniform_(-bound, bound, generator=generator)
        place(stored.parameter, stored.from_file(value))


def adapter_state_dict(model: nn.Module, gather: Gather = _cpu) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names and in its layout. Collective where the model is sharded."""
    return {stored.key: stored.to_file(gather(stored.parameter)) for stored in adapter_parameters(model)}


def save_adapter(model: PeftModel, directory: Path, gather: Gather = _cpu, is_main: bool | None = None) -> None:
    """Writes adapter_model.safetensors and adapter_config.json. Every rank calls it, the main process writes."""
    tensors = adapter_state_dict(model, gather)
    if is_main_process() if is_main is None else is_main:
        _write(model, directory, tensors)


def _write(model: PeftModel, directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True  # as PEFT writes it: who loads the adapter gets it frozen
    config.save_pretrained(str(directory))


def load_adapter_weights(model: PeftModel, directory: Path, place: Place = _copy) -> None:
    """Restores the adapter of `add_adapter` from a directory of `save_adapter` or of PEFT.

    Args:
        place: writes a whole tensor into a parameter; for sharded parameters one that takes the rank's own part.

    Raises:
        ValueError: an adapter tensor is missing, unexpected or of another shape; nothing has been changed then.
    """
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{directory}: {ADAPTER_WEIGHTS} is missing; it is not an adapter's checkpoint")
    expected = {stored.key: stored for stored in adapter_parameters(model)}
    with safe_open(path, framework="pt") as file:
        check_adapter_file(path, file, {key: stored.file_shape for key, stored in expected.items()})
        for key, stored in expected.items():
            place(stored.parameter, stored.from_file(file.get_tensor(key)))


def check_adapter_file(path: Path, file: Any, expected: dict[str, tuple[int, ...]]) -> None:
    found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - it is no dict
    for trouble, names in (("missing", expected.keys() - found), ("unexpected", found.keys() - expected)):
        if names:
            raise ValueError(
                f"{path}: {len(names)} {trouble} tensors, the first is {min(names)}; the file is not whole, or the "
                "adapter was trained on other targets"
            )
    for key, shape in expected.items():
        if found[key] != shape:
            raise ValueError(f"{path}: {key} has shape {list(found[key])}, not {list(shape)}; was lora.r another one?")


def stored_lora(directory: Path) -> LoraSection:
    """The `lora:` section that an adapter directory of `save_adapter` was made with, as far as its shape goes."""
    config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    parameters = config["target_parameters"] or []
    linears = [p.removesuffix(".weight") for p in parameters if p.endswith(".weight")]
    return LoraSection(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        target_modules=(*(config["target_modules"] or []), *linears),
        target_parameters=tuple(p for p in parameters if not p.endswith(".weight")),
    )


def is_reward_adapter(directory: Path) -> bool:
    """Whether an adapter directory holds a reward model's adapter and head."""
    path = directory / ADAPTER_CONFIG
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("task_type") == REWARD_MODEL_TASK


def adapter_base(directory: Path) -> Path | None:
    """The full checkpoint under an adapter directory (under the adapter that it was trained on, if its base is one), or
    None if the directory is a full checkpoint itself.

    A relative base is looked for beside the adapter first, so that a moved run directory keeps working.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    base, named = named_base(directory)
    if base is None:
        raise ValueError(
            f"{directory / ADAPTER_CONFIG}: the base checkpoint {named} is not there; put it back or edit "
            "base_model_name_or_path"
        )
    return adapter_base(base) or base


def named_base(directory: Path) -> tuple[Path | None, Path]:
    """The checkpoint, full or adapter, that an adapter was trained on, if it can be found, and what it is called."""
    named = Path(json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    full = (directory / named, directory.parent / named.name, named)
    # Not beside the adapter: there the same name, such as `last`, is that of an adapter of the same run.
    adapters = (directory / named, named)
    found = [c for c in full if (c / "config.json").is_file()]
    found += [c for c in adapters if (c / ADAPTER_CONFIG).is_file()]
    return (found[0] if found else None), named


def merge_adapter(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Loads the adapter in `directory`, ours or PEFT's, onto the model of `adapter_base` and folds it into the weights,
    after the adapter that it was trained on, if its base is one.

    Raises:
        ValueError: an adapter tensor is missing or unexpected; PEFT alone would warn, or say nothing.
    """
    base, _ = named_base(directory)
    if base is not None and (base / ADAPTER_CONFIG).is_file():
        model = merge_adapter(model, base)
    adapted = PeftModel.from_pretrained(model, directory, local_files_only=True)
    expected = {n.replace(f".{ADAPTER}", ""): tuple(p.shape) for n, p in adapted.named_parameters() if ".lora_" in n}
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
        check_adapter_file(directory / ADAPTER_WEIGHTS, file, expected)
    for path, module in list(adapted.named_modules()):
        if isinstance(module, ParamWrapper) and module.num_experts > 1:
            _merge_experts(module)
            parent, _, leaf = path.rpartition(".")
            if leaf != "base_layer":  # the outermost of the wrappers of one experts module
                setattr(adapted.get_submodule(parent), leaf, module.get_base_layer())
    return adapted.merge_and_unload().requires_grad_(True)  # PEFT leaves the base frozen


@torch.no_grad()
def _merge_experts(wrapper: ParamWrapper) -> None:
    """PEFT's merge expert by expert and rounded once; PEFT's own builds the update of all experts, in fp32."""
    weight = wrapper.get_param()
    a, b = (getattr(wrapper, part)[ADAPTER].weight for part in ("lora_A", "lora_B"))
    a = a.view(wrapper.num_experts, -1, a.shape[1])
    b = b.view(b.shape[0], -1, wrapper.num_experts)
    for expert in range(wrapper.num_experts):
        update = (b[:, :, expert] @ a[expert]).mul_(wrapper.scaling[ADAPTER])
        weight[expert].copy_(update.add_(weight[expert]))


def trainable_summary(model: nn.Module) -> str:
    """`trains 12,345 of 3,000,000 parameters (0.4 %): q_proj 4,096, mlp.experts.down_proj 8,249`; sharded parameters
    count with all their shards.
    """

    def size(parameter: nn.Parameter) -> int:
        return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in the model

    total = sum(map(size, model.parameters()))
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _trained_part(name)
            groups[group] = groups.get(group, 0) + size(parameter)
    count = sum(groups.values())
    parts = [group if group == "all" else f"{group} {size:,}" for group, size in groups.items()]
    return f"trains {count:,} of {total:,} parameters ({100 * count / total:.1f} %): {', '.join(parts)}"


def _trained_part(name: str) -> str:
    """What an adapter parameter adapts, as a recipe would name it; `all` for a parameter of the model itself."""
    path, is_adapter, rest = name.partition(".lora_")
    if not is_adapter:
        return "all"
    path = re.sub(r"^.*\.layers\.\d+\.", "", path)
    if path.endswith(".experts.lora"):
        return f"{path.removesuffix('.lora')}.{rest.rpartition('.')[2]}"
    return re.sub(r"^self_attn\.|^mlp\.(?=shared_experts\.)", "", path)
