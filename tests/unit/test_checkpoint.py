"""Checkpoints: whole or not at all, found again, linked, dropped; loading says what is wrong."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dots1Config, Dots1ForCausalLM, PreTrainedTokenizerFast

from dots_align.checkpoint import (
    check_whole,
    checkpoints,
    encode_rollout_prompts,
    ensure_start,
    load_model,
    load_trainable,
    model_directories,
    newest_whole,
    save_model,
    staged,
    stored_dtype,
    tensor_names,
)
from dots_align.config import DataSection, LoraSection, ModelSection, ParallelSection, SftRecipe
from dots_align.data.chat import CHAT_TEMPLATE, encode_prompt
from dots_align.model.lora import add_adapter
from dots_align.model.sharded_io import load_weights
from dots_align.types import Message, Prompt

WEIGHTS = "model.safetensors"


def recipe(output_dir: Path, **keys: Any) -> SftRecipe:
    return SftRecipe(stage="sft", output_dir=str(output_dir), data=DataSection(path="synthetic:sft"), **keys)


def publish(run_dir: Path, step: int, exact_match: float | None = None) -> Path:
    """A published checkpoint of two small files, evaluated if a score is given."""
    final = run_dir / f"checkpoint-{step}"
    with staged(final, {"stage": "sft", "step": step}) as staging:
        (staging / "config.json").write_text("{}")
        (staging / WEIGHTS).write_bytes(b"weights" * step)
    if exact_match is not None:
        (final / "eval.json").write_text(json.dumps({"metrics": {"exact_match": exact_match}}))
    return final


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in run_dir.iterdir())


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    with staged(final, {"stage": "sft"}) as staging:
        (staging / "config.json").write_text("{}")
        (staging / "sub").mkdir()
        (staging / "sub" / "x.bin").write_bytes(b"12345")
        assert not final.exists()
    assert names(tmp_path) == ["checkpoint-1"]
    manifest = json.loads((final / "manifest.json").read_text())
    assert {"format", "stage", "version", "created", "files"} <= manifest.keys()
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"config.json": 2, "sub/x.bin": 5}
    check_whole(final)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "checkpoint-1", {}) as staging:  # noqa: PT012
        (staging / "config.json").write_text("{}")
        raise error
    assert names(tmp_path) == []


def test_what_a_killed_process_left_behind_is_not_taken_over(tmp_path: Path) -> None:
    leftover = tmp_path / ".checkpoint-1.staging"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    assert checkpoints(tmp_path) == []
    publish(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert not (tmp_path / "checkpoint-1" / "half").exists()


def test_a_process_that_dies_while_replacing_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = publish(tmp_path, 1)

    def dies(directory: Path, **_: Any) -> None:
        for path in Path(directory).glob("config.json"):
            path.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dots_align.checkpoint.shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, 1)
    check_whole(final)
    publish(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_link_is_followed_once(copied: Path, tmp_path: Path) -> None:
    """It may lead elsewhere before all files are read, or the next process looks."""
    for number, place in enumerate((copied.name, copied)):
        link = copied.with_name(f"link{number}")
        link.symlink_to(place)
        assert model_directories(ModelSection(path=str(link))) == (copied, copied)
        assert ensure_start(recipe(tmp_path, model=ModelSection(path=str(link))), tmp_path).path == str(copied)


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    with staged(final, {}) as staging:
        (staging / "secret.safetensors").touch(mode=0o600)
    mode = (final / "manifest.json").stat().st_mode
    assert (final / "secret.safetensors").stat().st_mode == mode


def test_damage_is_named(tmp_path: Path) -> None:
    final = publish(tmp_path, 2)
    (final / WEIGHTS).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors has 5 bytes, manifest\.json says 14; copy it again"):
        check_whole(final)
    (final / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing, which manifest\.json names; copy the check"):
        check_whole(final)
    shutil.rmtree(final)
    with pytest.raises(ValueError, match="no such checkpoint directory"):
        check_whole(final)
    final.mkdir()
    with pytest.raises(ValueError, match="not a checkpoint directory"):
        check_whole(final)
    (final / "last").mkdir()
    with pytest.raises(ValueError, match=r"this is a run, give one of its checkpoints: .*checkpoint-2/last"):
        check_whole(final)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """As of a hub download that stopped: an index but not all of its files, and no manifest."""
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing, which model\.safe"):
        check_whole(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x")
    check_whole(tmp_path)


def test_a_directory_without_weights_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        check_whole(tmp_path)


def test_an_edited_card_and_an_evaluation_do_no_damage(tmp_path: Path) -> None:
    final = publish(tmp_path, 1, exact_match=0.5)
    (final / "README.md").write_text("a card")
    check_whole(final)


def test_the_newest_whole_checkpoint_is_found_by_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_whole(tmp_path) is None
    for step in (9, 10, 100):
        publish(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    (tmp_path / "checkpoint-100" / WEIGHTS).unlink()
    with caplog.at_level(logging.WARNING, "dots_align"):
        assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-100: model.safetensors is missing" in caplog.text
    (tmp_path / "checkpoint-10" / "manifest.json").write_text("{ torn")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-9"


def test_loading_gives_model_and_tokenizer(model_dir: Path, loaded_model: Dots1ForCausalLM) -> None:
    model, tokenizer = load_model(ModelSection(path=str(model_dir)))
    assert model.config._attn_implementation == "dots_align_packed"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded_model.parameters(), strict=True))
    assert tokenizer.eos_token == "<|endofresponse|>"
    assert stored_dtype(model_dir) == "float32"
    assert "model.layers.2.mlp.experts.15.up_proj.weight" in tensor_names(model_dir)


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "manifest.json").unlink()


def test_loading_another_architecture_is_refused(copied: Path) -> None:
    edit_config(copied, lambda config: config.update(architectures=["Qwen2ForCausalLM"]))
    with pytest.raises(ValueError, match=r"this is a Qwen2ForCausalLM checkpoint; dots_align trains Dots1ForCausalLM"):
        load_model(ModelSection(path=str(copied)))


def test_loading_torn_weights_is_refused(copied: Path) -> None:
    weights = copied / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"manifest\.json says"):
        load_model(ModelSection(path=str(copied)))
    (copied / "manifest.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(ModelSection(path=str(copied)))


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors.index.json"])
def test_json_that_is_torn_is_named(copied: Path, name: str) -> None:
    if name != "manifest.json":
        (copied / "manifest.json").unlink()
    (copied / name).write_text('{"a')
    with pytest.raises(ValueError, match=rf"{re.escape(str(copied / name))}: damaged, no JSON"):
        load_model(ModelSection(path=str(copied)))


def test_a_configuration_that_contradicts_itself_is_named(copied: Path) -> None:
    edit_config(copied, lambda config: config.update(num_hidden_layers=9))
    with pytest.raises(ValueError, match=r"config\.json: .*`num_hidden_layers` \(9\)") as caught:
        load_model(ModelSection(path=str(copied)))
    assert "\n" not in str(caught.value)


def test_quantized_weights_are_refused(copied: Path) -> None:
    """transformers alone would take whole numbers for weights."""
    tensors = load_file(copied / WEIGHTS)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    (copied / "manifest.json").unlink()
    refused = pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight is stored as I8; .* F32, BF16")
    with refused:
        load_model(ModelSection(path=str(copied)))
    with refused:  # as on several processes: from the files into what each keeps
        load_weights(Dots1ForCausalLM(Dots1Config.from_pretrained(copied)), copied)


def test_what_says_that_it_is_quantized_is_refused_by_its_configuration(copied: Path) -> None:
    edit_config(copied, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ValueError, match=r"config\.json: the weights are quantized"):
        model_directories(ModelSection(path=str(copied)))


def test_weights_are_opened_only_to_be_read(copied: Path) -> None:
    """At 142 B parameters there are hundreds of files, on a file system far away, and many a process."""
    (copied / WEIGHTS).write_bytes(bytes((copied / WEIGHTS).stat().st_size))
    section = ModelSection(path=str(copied))
    assert model_directories(section) == (copied, copied)
    for load in (lambda: load_model(section), lambda: load_trainable(section, None, bf16=False, scalar_head=True)):
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(copied))}/{WEIGHTS}: cannot be loaded: .*; copy it again"
        ):
            load()


def test_prompts_are_encoded_by_configuration_and_tokenizer_alone(
    copied: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (copied / WEIGHTS).write_bytes(bytes((copied / WEIGHTS).stat().st_size))
    room = Dots1Config.from_pretrained(copied).max_position_embeddings
    prompts = [Prompt([Message("user", "1+1?")], "2", "a.jsonl:1")]
    (ids,) = encode_rollout_prompts(ModelSection(path=str(copied)), prompts, 4)
    assert ids == encode_prompt(tokenizer, prompts[0].messages)
    assert encode_rollout_prompts(ModelSection(path=str(copied)), prompts, room - len(ids)) == [ids]
    with pytest.raises(
        ValueError, match=rf"a\.jsonl:1: prompt of {len(ids)} tokens plus max_tokens=.* of {room} tokens"
    ):
        encode_rollout_prompts(ModelSection(path=str(copied)), prompts, room - len(ids) + 1)


def test_weights_without_a_tokenizer_say_what_to_copy(copied: Path) -> None:
    """As `Dots1ForCausalLM.save_pretrained` leaves them."""
    for path in (copied / "manifest.json", *copied.glob("tokenizer*")):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer; copy tokenizer\.json and tokenizer_config\.json"):
        load_model(ModelSection(path=str(copied)))


def test_a_tokenizer_without_a_template_gets_the_dots_layout_if_it_knows_its_tokens(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    (copied / "chat_template.jinja").unlink()
    assert load_model(ModelSection(path=str(copied)))[1].chat_template == CHAT_TEMPLATE
    settings = (copied / "tokenizer.json").read_text(encoding="utf-8")
    (copied / "tokenizer.json").write_text(settings.replace("<|userprompt|>", "<|elsewhere|>"), encoding="utf-8")
    config = (copied / "tokenizer_config.json").read_text(encoding="utf-8").replace("<|userprompt|>", "<|elsewhere|>")
    (copied / "tokenizer_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match=r"no chat template, and no token <\|userprompt\|> of the dots layout"):
        load_model(ModelSection(path=str(copied)))


def test_a_stage_after_lora_trains_all_of_the_merged_model(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, model_dir: Path, tmp_path: Path
) -> None:
    adapted = add_adapter(model, LoraSection(r=2), str(model_dir), seed=0)
    save_model(adapted, tokenizer, tmp_path / "adapter")
    merged, _ = load_trainable(ModelSection(path=str(tmp_path / "adapter")), ParallelSection(), bf16=False)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_loading_nothing_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path is not set; give a checkpoint directory, or model\.preset=tiny"):
        load_model(ModelSection())
    with pytest.raises(ValueError, match="no such checkpoint directory"):
        load_model(ModelSection(path=str(tmp_path / "none")))


def test_fresh_weights_are_made_once_and_kept(tmp_path: Path) -> None:
    first = ensure_start(recipe(tmp_path, model=ModelSection(preset="tiny")), tmp_path)
    assert (first.path, first.preset) == (str(tmp_path / "init"), None)
    written = (tmp_path / "init" / WEIGHTS).stat().st_mtime_ns
    again = ensure_start(recipe(tmp_path, model=ModelSection(preset="tiny")), tmp_path)
    assert again == first
    assert (tmp_path / "init" / WEIGHTS).stat().st_mtime_ns == written
    model, tokenizer = load_model(first)
    assert len(tokenizer) <= model.config.vocab_size == 512
    assert model.generation_config.eos_token_id == sorted([tokenizer.eos_token_id, tokenizer.pad_token_id])


def test_a_start_from_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    section = ModelSection(path="somewhere")
    assert ensure_start(recipe(tmp_path, model=section), tmp_path) == section
    assert names(tmp_path) == []


def test_saving_writes_the_hubs_layout(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(model, tokenizer, tmp_path)
    found = tensor_names(tmp_path)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in found
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in found
    assert not any("gate_up_proj" in name for name in found)
