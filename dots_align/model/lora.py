"""LoRA adapters through PEFT, the one place that imports it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from dots_align.config import LoraSection

ADAPTER_CONFIG = "adapter_config.json"
# PEFT 0.21 rewrites these names for models whose experts transformers fuses (`_convert_peft_config_moe`), wherever
# they occur.
_FUSED = ("gate_proj", "up_proj", "down_proj")


def add_adapter(model: PreTrainedModel, lora: LoraSection, base_path: str) -> PeftModel:
    """Wraps a model with fresh adapters on `lora.target_modules`; `base_path` is what they will name as their base.

    Raises:
        ValueError: a target matches no linear layer, so that training would silently leave it out, or is an MLP
        projection.
    """
    if fused := [t for t in lora.target_modules if t.rsplit(".", 1)[-1] in _FUSED]:
        raise ValueError(
            f"lora.target_modules: {fused[0]!r} is not offered: PEFT would turn it into the routed experts and leave "
            "out the shared ones and the dense layer; target q_proj, k_proj, v_proj, o_proj"
        )
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(f"lora.target_modules: {target!r} matches no linear layer; there are {', '.join(known)}")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def adapter_base(directory: Path) -> Path | None:
    """The base checkpoint that an adapter directory names, or None if the directory is a full checkpoint.

    A relative base is looked for beside the adapter first, so that a moved run directory keeps working.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return None
    named = Path(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    for candidate in (directory / named, directory.parent / named.name, named):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"{path}: the base checkpoint {named} is not there; put it back or edit base_model_name_or_path")


def merge_adapter(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Loads the adapter in `directory` onto its base model and folds it into the weights."""
    return PeftModel.from_pretrained(model, directory, local_files_only=True).merge_and_unload()


def trainable_summary(model: torch.nn.Module) -> str:
    """`trains 12,345 of 3,000,000 parameters (0.4 %): q_proj, v_proj`"""
    total = sum(p.numel() for p in model.parameters())
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    modules = sorted({n.split(".lora_")[0].rsplit(".", 1)[-1] if ".lora_" in n else "all" for n in trained})
    count = sum(trained.values())
    return f"trains {count:,} of {total:,} parameters ({count / total:.1%}): {', '.join(modules)}"
