"""LoRA adapters: what they reach, and that merging keeps what they say."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Dots1ForCausalLM

from dots_align.config import LoraSection
from dots_align.model.lora import adapter_base, add_adapter, merge_adapter, trainable_summary
from dots_align.model.packed import pack

CPU = torch.device("cpu")


def train_a_little(adapted: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("target", ["qkv_proj", "proj", "experts"])
def test_a_target_that_matches_nothing_names_what_there_is(model: Dots1ForCausalLM, target: str) -> None:
    with pytest.raises(ValueError, match=rf"'{target}' matches no linear layer; there are down_proj, gate_proj"):
        add_adapter(model, LoraSection(target_modules=("q_proj", target)), "base")


def test_a_fresh_adapter_changes_nothing_and_trains_only_itself(model: Dots1ForCausalLM, token_ids) -> None:
    inputs = pack(token_ids(12, 5), CPU).model_inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        adapted = add_adapter(model, LoraSection(r=4, target_modules=("q_proj", "o_proj")), "base")
        torch.testing.assert_close(adapted(**inputs).logits, before, atol=1e-6, rtol=0)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    total = sum(p.numel() for p in adapted.parameters())
    count = sum(p.numel() for n, p in adapted.named_parameters() if n in trained)
    assert trainable_summary(adapted) == (
        f"trains {count:,} of {total:,} parameters ({count / total:.1%}): o_proj, q_proj"
    )


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LoraSection().target_modules])
def test_a_merged_adapter_says_what_the_adapter_says(
    model: Dots1ForCausalLM, model_dir: Path, token_ids, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    inputs = pack(token_ids(12, 5), CPU).model_inputs()
    base = copy.deepcopy(model)
    adapted = add_adapter(model, LoraSection(r=4, target_modules=targets), str(model_dir))
    train_a_little(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert adapter_base(tmp_path / "adapter") == model_dir
    with torch.no_grad():
        plain, wanted = base(**inputs).logits, adapted.eval()(**inputs).logits
        merged = merge_adapter(base, tmp_path / "adapter")
        found = merged(**inputs).logits
    assert isinstance(merged, Dots1ForCausalLM)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - plain).abs().max() > 0.1


def test_the_base_is_found_beside_a_moved_adapter_and_missed_by_name(model_dir: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "checkpoint-1"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/run/init"}))
    with pytest.raises(ValueError, match=r"the base checkpoint /gone/run/init is not there; put it back"):
        adapter_base(adapter)
    shutil.copytree(model_dir, adapter.parent / "init")
    assert adapter_base(adapter) == adapter.parent / "init"
    assert adapter_base(model_dir) is None


def test_default_targets_are_attention_and_take_dropout(model: Dots1ForCausalLM) -> None:
    adapted = add_adapter(model, LoraSection(r=4, lora_dropout=0.1), "base")
    trained = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("target", ["gate_proj", "up_proj", "shared_experts.down_proj"])
def test_projections_that_peft_would_turn_into_experts_are_refused(model: Dots1ForCausalLM, target: str) -> None:
    with pytest.raises(ValueError, match=f"'{target}' is not offered"):
        add_adapter(model, LoraSection(target_modules=("q_proj", target)), "base")
