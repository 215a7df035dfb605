"""An adapter by itself, for plain PEFT on plain transformers: little beside a base that its users have already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Dots1Config

from dots_align.checkpoint import check_whole, staged
from dots_align.export.card import ADAPTER_USAGE, model_card
from dots_align.export.hf import (
    EXPORT_STAGE,
    check_output,
    finished,
    last_step,
    parameter_counts,
    write_generation_config,
    write_tokenizer,
)
from dots_align.export.source import training_history
from dots_align.export.verify import verify_export
from dots_align.model.lora import ADAPTER_CONFIG, adapter_base, named_base
from dots_align.runtime import logger, write_json

WEIGHTS = "adapter_model.safetensors"


def export_adapter(checkpoint: Path, output: Path, base_name: str, overwrite: bool = False) -> Path:
    """Writes an adapter checkpoint as a directory that PEFT loads, published once a fresh process with plain
    transformers and PEFT has put it on its base and answered like the checkpoint.

    Args:
        checkpoint: an adapter checkpoint directory.
        output: the directory to make.
        base_name: what users know its base as, on the hub or in their file system; goes into adapter_config.json.
        overwrite: replace an earlier export there; nothing else is ever replaced.

    Returns:
        `output`.

    Raises:
        ValueError: the checkpoint is damaged, no adapter, or one on top of another; or `output` holds something else.
    """
    check_whole(checkpoint)
    base = adapter_base(checkpoint)
    if base is None:
        raise ValueError(f"{checkpoint}: is no adapter; export it with --to hf")
    below, _ = named_base(checkpoint)
    if below is not None and adapter_base(below) is not None:
        raise ValueError(f"{checkpoint}: was trained on another adapter, which it needs; export both merged, --to hf")
    check_output(checkpoint, output, overwrite)
    fields = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    history = training_history(checkpoint)
    manifest: dict[str, Any] = {"stage": EXPORT_STAGE, "step": last_step(history), "training": history.as_dict()}
    with staged(output.resolve(), manifest) as staging:
        shutil.copyfile(checkpoint / WEIGHTS, staging / WEIGHTS)
        write_json(staging / ADAPTER_CONFIG, {**fields, "base_model_name_or_path": base_name})
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        write_tokenizer(tokenizer, staging)
        write_generation_config(base, tokenizer, staging)
        manifest |= finished(lambda path: {"verification": verify_export(checkpoint, path, base=base)}, staging, output)
        config = Dots1Config.from_pretrained(base, local_files_only=True)
        usage = ADAPTER_USAGE.replace("BASE", base_name)
        card = model_card(config, parameter_counts(config), history, manifest["verification"], usage=usage)
        (staging / "README.md").write_text(card, encoding="utf-8")
    logger.info("exported the adapter %s to %s", checkpoint, output)
    return output
