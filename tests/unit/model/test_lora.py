"""LoRA adapters: what they reach, that PEFT reads them, and that merging keeps what they say."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Dots1ForCausalLM

from dots_align.config import LoraSection
from dots_align.model.dots1 import load_base_model
from dots_align.model.lora import (
    ADAPTER_WEIGHTS,
    AdaptedModel,
    adapter_base,
    adapter_state_dict,
    add_adapter,
    initialise_adapter,
    load_adapter_weights,
    merge_adapter,
    save_adapter,
    trainable_summary,
)
from dots_align.model.packed import pack

CPU = torch.device("cpu")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EVERYTHING = LoraSection(
    r=4,
    lora_alpha=12,
    target_modules=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    target_parameters=EXPERTS,
)
SECTIONS = {
    "attention": LoraSection(r=4, target_modules=("q_proj", "v_proj")),
    "shared experts": LoraSection(r=3, target_modules=("shared_experts.up_proj",)),
    "gate and up": LoraSection(r=4, target_modules=(), target_parameters=EXPERTS[:1]),
    "down": LoraSection(r=4, target_modules=("k_proj",), target_parameters=("experts.down_proj",)),
    "one layer": LoraSection(r=8, target_modules=(), target_parameters=("model.layers.2.mlp.experts.down_proj",)),
    "everything": EVERYTHING,
}


@pytest.fixture(scope="session")
def loaded_model(model_dir: Path) -> Dots1ForCausalLM:
    return load_base_model(model_dir, "float32", "packed", "grouped").eval()


@pytest.fixture
def ids(token_ids) -> torch.Tensor:
    return torch.tensor(token_ids(21))


def plain_model(model_dir: Path) -> Dots1ForCausalLM:
    """The base as anybody loads it who has transformers and not this package."""
    return Dots1ForCausalLM.from_pretrained(model_dir, dtype=torch.float32, experts_implementation="eager").eval()


def train_a_little(adapted: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained(model: Any, lora: LoraSection, base: Path | str = "base") -> AdaptedModel:
    adapted = add_adapter(model, lora, str(base)).eval()
    train_a_little(adapted)
    return adapted


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("target", ["qkv_proj", "proj", "experts", "lm_head", "gate"])
def test_a_target_that_matches_nothing_names_what_there_is(model: Dots1ForCausalLM, target: str) -> None:
    with pytest.raises(ValueError, match=rf"'{target}' matches no linear layer; there are down_proj, gate_proj"):
        add_adapter(model, LoraSection(target_modules=("q_proj", target)), "base")


@pytest.mark.parametrize("target", ["mlp.experts.up_proj", "gate_proj", "mlp.down_proj", "q_proj.weight"])
def test_a_parameter_that_matches_nothing_names_what_there_is(model: Dots1ForCausalLM, target: str) -> None:
    known = "there are mlp.experts.down_proj, mlp.experts.gate_up_proj"
    with pytest.raises(ValueError, match=rf"lora.target_parameters: '{target}' matches no routed .*; {known}$"):
        add_adapter(model, LoraSection(target_parameters=(*EXPERTS, target)), "base")


def test_routed_experts_among_the_modules_are_sent_to_the_right_key(model: Dots1ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"routed experts are named in lora\.target_parameters"):
        add_adapter(model, LoraSection(target_modules=EXPERTS), "base")


def test_nothing_to_train_is_refused(model: Dots1ForCausalLM) -> None:
    with pytest.raises(ValueError, match="neither target_modules nor target_parameters"):
        add_adapter(model, LoraSection(target_modules=()), "base")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_that_would_leave_the_adapter_out_are_refused(model_dir: Path, implementation: str) -> None:
    model = load_base_model(model_dir, "float32", "packed", implementation)
    with pytest.raises(ValueError, match=f"experts_implementation={implementation} .* set .*=grouped"):
        add_adapter(model, LoraSection(target_parameters=EXPERTS), "base")
    assert not any("lora" in name for name, _ in model.named_parameters())
    add_adapter(model, LoraSection(target_modules=("q_proj", "shared_experts.up_proj")), "base")


@pytest.mark.parametrize("lora", [SECTIONS["down"], SECTIONS["shared experts"]])
def test_dropout_that_peft_could_not_load_is_refused(model: Dots1ForCausalLM, lora: LoraSection) -> None:
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1: PEFT could not load .* set it to 0"):
        add_adapter(model, lora.model_copy(update={"lora_dropout": 0.1}), "base")


def test_default_targets_are_attention_and_take_dropout(model: Dots1ForCausalLM) -> None:
    adapted = add_adapter(model, LoraSection(r=4, lora_dropout=0.1), "base")
    found = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, p in adapted.named_parameters() if p.requires_grad}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_plain_name_means_dense_and_shared_layers_and_not_the_routed_ones(model: Dots1ForCausalLM) -> None:
    adapted = add_adapter(model, LoraSection(r=4, target_modules=("down_proj",)), "base")
    found = {n.split("layers.")[1].split(".lora_")[0] for n in adapter_of(adapted)}
    assert found == {"0.mlp.down_proj", "1.mlp.shared_experts.down_proj", "2.mlp.shared_experts.down_proj"}


def test_the_summary_counts_what_is_trained(model: Dots1ForCausalLM) -> None:
    before = sum(p.numel() for p in model.parameters())
    assert trainable_summary(model) == f"trains {before:,} of {before:,} parameters (100.0 %): all"
    lora = LoraSection(r=4, target_modules=("v_proj", "shared_experts.up_proj", "mlp.gate_proj"))
    adapted = add_adapter(model, lora.model_copy(update={"target_parameters": EXPERTS[1:]}), "base")
    # hidden 64, dense 96, shared 2 x 32, routed 16 experts of 32; three layers, the first one dense
    parts = {
        "v_proj": 3 * 4 * (64 + 64),
        "mlp.gate_proj": 4 * (64 + 96),
        "mlp.experts.down_proj": 2 * 16 * 4 * (32 + 64),
        "shared_experts.up_proj": 2 * 4 * (64 + 64),
    }
    count = sum(parts.values())
    listed = ", ".join(f"{name} {size:,}" for name, size in parts.items())
    total = before + count
    assert trainable_summary(adapted) == (
        f"trains {count:,} of {total:,} parameters ({100 * count / total:.1f} %): {listed}"
    )
    assert count == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
def test_outputs_and_gradients_are_those_of_pefts_own_target_parameters(
    model: Dots1ForCausalLM, model_dir: Path, ids: torch.Tensor, tmp_path: Path, parameters: tuple[str, ...]
) -> None:
    lora = LoraSection(r=4, lora_alpha=12, target_modules=("q_proj", "v_proj"), target_parameters=parameters)
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj"],
        target_parameters=list(parameters),
        task_type="CAUSAL_LM",
    )
    peft: Any = get_peft_model(plain_model(model_dir), config).eval()
    train_a_little(peft)
    peft.save_pretrained(tmp_path)
    ours = add_adapter(model, lora, str(model_dir)).eval()
    load_adapter_weights(ours, tmp_path)
    torch.testing.assert_close(logits(ours, ids), logits(peft, ids), atol=1e-5, rtol=1e-5)
    assert (logits(ours, ids) - logits(plain_model(model_dir), ids)).abs().max() > 0.1
    loss_of(ours, ids).backward()
    loss_of(peft, ids).backward()
    wanted = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.grad is not None}
    found = adapter_state_dict(ours, gather=lambda parameter: parameter.grad)  # pyright: ignore[reportArgumentType]
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("lora", SECTIONS.values(), ids=SECTIONS)
def test_a_fresh_adapter_says_nothing_and_trains_only_itself(model: Any, ids: torch.Tensor, lora: LoraSection) -> None:
    before, weights = logits(model, ids), {n: p.clone() for n, p in model.named_parameters()}
    adapted = add_adapter(model, lora, "base").train()
    torch.testing.assert_close(logits(adapted, ids), before, atol=1e-6, rtol=0)
    start = adapter_of(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_of(adapted, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, value in adapter_of(adapted).items():
        assert not torch.equal(value, start[name]), name
    for name, parameter in adapted.named_parameters():
        if ".lora_" not in name:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, weights[original]), name


def test_the_adapter_is_switched_off_exactly_and_on_again(model: Any, ids: torch.Tensor) -> None:
    base = copy.deepcopy(model)
    adapted = trained(model, EVERYTHING)
    on = logits(adapted, ids)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids), logits(base, ids))
        assert not any(p.requires_grad for p in adapted.parameters())
    assert torch.equal(logits(adapted, ids), on)
    assert all(p.requires_grad == (".lora_" in n) for n, p in adapted.named_parameters())


def test_gradient_checkpointing_changes_no_gradient(model: Any, ids: torch.Tensor) -> None:
    adapted = trained(model, EVERYTHING).train()
    loss_of(adapted, ids).backward()
    wanted = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(adapted, ids).backward()
    assert wanted
    for name, parameter in adapted.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-7, rtol=1e-5)


def test_bf16_autocast_and_bf16_weights_train(model_dir: Path, model: Any, ids: torch.Tensor) -> None:
    exact = logits(trained(copy.deepcopy(model), EVERYTHING), ids)
    adapted = trained(model, EVERYTHING).train()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = adapted(input_ids=ids, labels=ids, use_cache=False)
    mixed.loss.backward()
    half = trained(load_base_model(model_dir, "bfloat16", "packed", "grouped"), EVERYTHING).train()
    low = half(input_ids=ids, labels=ids, use_cache=False)
    low.loss.backward()
    for found, model_ in ((mixed, adapted), (low, half)):
        assert torch.median((found.logits.float() - exact).abs()) < 0.05 * exact.abs().max()
        for name, parameter in model_.named_parameters():
            if ".lora_" in name:
                assert parameter.dtype == torch.float32
                assert torch.isfinite(parameter.grad).all()
                assert parameter.grad.abs().max() > 0, name


def test_initial_values_depend_on_the_seed_alone(model_dir: Path, model: Any) -> None:
    adapted = add_adapter(model, EVERYTHING, "base", seed=3)
    with torch.device("meta"):
        empty = Dots1ForCausalLM(model.config)
    on_meta = add_adapter(empty, EVERYTHING, "base", seed=3)
    assert all(p.is_meta for p in on_meta.parameters())
    on_meta.to_empty(device="cpu")
    torch.manual_seed(99)
    initialise_adapter(on_meta, seed=3)
    found, wanted = adapter_of(on_meta), adapter_of(adapted)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = adapter_of(add_adapter(load_base_model(model_dir, "float32", "packed", "grouped"), EVERYTHING, "base", 4))
    for name, value in wanted.items():
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            bound = value.shape[-1] ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("lora", SECTIONS.values(), ids=SECTIONS)
def test_a_saved_adapter_loads_in_plain_peft_with_the_same_outputs(
    model: Any, model_dir: Path, ids: torch.Tensor, tmp_path: Path, lora: LoraSection
) -> None:
    adapted = trained(model, lora, model_dir)
    adapted.save_pretrained(tmp_path)
    assert adapter_base(tmp_path) == model_dir
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns about tensors that it misses
        loaded = PeftModel.from_pretrained(plain_model(model_dir), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), logits(adapted, ids), atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(d / ADAPTER_WEIGHTS) for d in (tmp_path, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_config_file_is_sorted_and_names_targets_as_peft_understands_them(model: Any, tmp_path: Path) -> None:
    save_adapter(add_adapter(model, EVERYTHING, "base"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj"]
    assert config["target_parameters"] == sorted((*EXPERTS, "gate_proj.weight", "up_proj.weight", "down_proj.weight"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12, "base")
    assert config["inference_mode"]


def test_saving_and_resuming_as_transformers_trainer_does_it(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    fresh = copy.deepcopy(model)
    adapted = trained(model, EVERYTHING)
    adapted.save_pretrained(tmp_path / "own")
    adapted.save_pretrained(str(tmp_path / "state"), state_dict=adapted.state_dict(), safe_serialization=True)
    resumed = add_adapter(fresh, EVERYTHING, "base", seed=5).eval()
    for directory in ("own", "state"):
        initialise_adapter(resumed, seed=6)
        resumed.load_adapter(str(tmp_path / directory), resumed.active_adapters[0], is_trainable=True)
        assert torch.equal(logits(resumed, ids), logits(adapted, ids))
        assert all(p.requires_grad == (".lora_" in n) for n, p in resumed.named_parameters())


def test_parameters_are_gathered_and_placed_one_by_one_in_one_order(model: Any, tmp_path: Path) -> None:
    adapted = trained(model, EVERYTHING)
    gathered: list[int] = []
    placed: list[int] = []

    def gather(parameter: torch.Tensor) -> torch.Tensor:
        gathered.append(id(parameter))
        return parameter.detach().clone()

    save_adapter(adapted, tmp_path, gather=gather)
    before = adapter_of(adapted)
    load_adapter_weights(adapted, tmp_path, place=lambda p, whole: placed.append(id(p)) or p.data.copy_(whole))
    everything = [id(p) for n, p in adapted.named_parameters() if ".lora_" in n]
    assert sorted(gathered) == sorted(everything)
    assert placed == gathered
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(adapted).items())


def test_a_file_that_is_not_whole_is_refused_and_changes_nothing(model: Any, tmp_path: Path) -> None:
    adapted = trained(model, EVERYTHING)
    save_adapter(adapted, tmp_path)
    path = tmp_path / ADAPTER_WEIGHTS
    tensors, before = load_file(path), adapter_of(adapted)
    first = min(tensors)
    broken: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in tensors.items() if k != first}, f"1 missing tensors, the first is {first}"),
        ({**tensors, "more.lora_A.weight": torch.zeros(2, 2)}, r"1 unexpected tensors, the first is more\.lora_A"),
        ({**tensors, first: tensors[first][:-1].clone()}, f"{first} has shape .*, not .* lora.r"),
    ]
    initialise_adapter(adapted, seed=8)
    other = adapter_of(adapted)
    for content, message in broken:
        save_file(content, path)
        with pytest.raises(ValueError, match=message):
            load_adapter_weights(adapted, tmp_path)
        assert all(torch.equal(value, other[name]) for name, value in adapter_of(adapted).items())
    path.unlink()
    with pytest.raises(ValueError, match=f"{ADAPTER_WEIGHTS} is missing"):
        load_adapter_weights(adapted, tmp_path)
    assert before.keys() == other.keys()


def test_the_base_is_found_beside_a_moved_adapter_and_missed_by_name(model_dir: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "checkpoint-1"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/run/init"}))
    with pytest.raises(ValueError, match=r"the base checkpoint /gone/run/init is not there; put it back"):
        adapter_base(adapter)
    shutil.copytree(model_dir, adapter.parent / "init")
    assert adapter_base(adapter) == adapter.parent / "init"
    assert adapter_base(model_dir) is None


# ------------------------------------------------------------------------------------------------------- merge and DPO


@pytest.mark.parametrize("lora", SECTIONS.values(), ids=SECTIONS)
def test_a_merged_adapter_says_what_the_adapter_says(
    model: Any, model_dir: Path, token_ids: Callable[..., list[list[int]]], tmp_path: Path, lora: LoraSection
) -> None:
    inputs = pack(token_ids(12, 5), CPU).model_inputs()
    base, names = copy.deepcopy(model), set(model.state_dict())
    adapted = trained(model, lora, model_dir)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        plain, wanted = base(**inputs).logits, adapted(**inputs).logits
        merged: Any = merge_adapter(base, tmp_path / "adapter")
        found = merged(**inputs).logits
    assert isinstance(merged, Dots1ForCausalLM)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - plain).abs().max() > 0.1


def test_an_adapter_trained_on_an_adapter_rests_on_the_same_base(
    model: Any, model_dir: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    first, second = tmp_path / "sft" / "checkpoint-2", tmp_path / "dpo" / "checkpoint-2"
    base, middle = copy.deepcopy(model), copy.deepcopy(model)
    save_adapter(trained(model, EVERYTHING, model_dir), first)
    (tmp_path / "sft" / "last").symlink_to(first.name)
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "last").symlink_to(second.name)
    adapted = trained(merge_adapter(middle, first), SECTIONS["down"], tmp_path / "sft" / "last")
    save_adapter(adapted, second)
    assert adapter_base(second) == model_dir
    torch.testing.assert_close(logits(merge_adapter(base, second), ids), logits(adapted, ids), atol=1e-5, rtol=1e-5)


def test_merging_into_bf16_rounds_once(model_dir: Path, tmp_path: Path) -> None:
    lora = LoraSection(r=4, target_modules=(), target_parameters=EXPERTS)
    base = load_base_model(model_dir, "bfloat16", "packed", "grouped")
    save_adapter(trained(copy.deepcopy(base), lora, model_dir), tmp_path)
    weight = base.get_parameter("model.layers.1.mlp.experts.down_proj").detach().clone()
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    prefix = "base_model.model.model.layers.1.mlp.experts.lora_"
    a, b = tensors[f"{prefix}A.weight"].view(16, 4, 32), tensors[f"{prefix}B.weight"].view(64, 4, 16)
    wanted = (weight.float() + lora.lora_alpha / 4 * torch.einsum("ore,eri->eoi", b, a)).bfloat16()
    merged = merge_adapter(base, tmp_path).get_parameter("model.layers.1.mlp.experts.down_proj")
    assert (merged != wanted).float().mean() < 1e-3  # a sum in another order may round to the neighbour


def test_merging_a_file_that_is_not_whole_is_refused(model: Any, model_dir: Path, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    save_adapter(trained(model, EVERYTHING, model_dir), tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    missing = next(key for key in tensors if ".experts." in key)
    save_file({k: v for k, v in tensors.items() if k != missing}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="missing tensors"):
        merge_adapter(base, tmp_path)


def test_dpo_takes_the_model_with_adapters_off_as_its_reference(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base = copy.deepcopy(model)
    adapted = add_adapter(model, EVERYTHING, "base")
    count = len(list(adapted.parameters()))
    pair = {
        "prompt": [{"role": "user", "content": "1 + 1"}],
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected": [{"role": "assistant", "content": "three"}],
    }
    trainer = DPOTrainer(
        model=adapted,
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, max_length=64),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([pair]),
    )
    assert len(list(adapted.parameters())) == count
    train_a_little(adapted)
    inputs = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_ref_log_probs(adapted, inputs)
    with torch.no_grad():
        scores = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    picked = scores[:, :-1].gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    wanted = (picked * inputs["completion_mask"][:, 1:]).sum(1)
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="a second adapter"):
        adapted.add_adapter("ref", adapted.peft_config["default"])
