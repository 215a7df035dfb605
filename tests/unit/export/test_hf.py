"""What an export writes: the weights bit by bit, JSON that others can read, all of it or nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Dots1Config, PreTrainedTokenizerFast

from dots_align.checkpoint import check_whole, load_model, save_model
from dots_align.config import ModelSection
from dots_align.data.chat import CHAT_TEMPLATE
from dots_align.export.hf import export_hf
from dots_align.export.template import portable_template

CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 plus 3?"}],
    [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": "你好\n 世界 "}],
    [
        {"role": "user", "content": "{% generation %}"},
        {"role": "assistant", "content": " 五。 "},
        {"role": "user", "content": "next"},
        {"role": "assistant", "content": "6\n"},
    ],
    [{"role": "assistant", "content": "I begin."}],
]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(checkpoint, tmp_path_factory.mktemp("out") / "model")


def test_weights_are_bit_equal_under_the_names_of_the_hub(checkpoint: Path, exported: Path) -> None:
    ours, theirs = load_file(checkpoint / "model.safetensors"), load_file(exported / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    experts = {name for name in theirs if ".experts." in name}
    assert len(experts) == 3 * 32 * 3  # layers that route, experts, projections
    assert all(re.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", n) for n in experts)
    biases = {name: t for name, t in theirs.items() if name.endswith("mlp.gate.e_score_correction_bias")}
    assert len(biases) == 3
    assert all(t.dtype == torch.float32 and t.abs().min() > 0 for t in biases.values())


def test_large_weights_are_split_and_whole(checkpoint: Path, tmp_path: Path) -> None:
    limit = 4_000_000
    output = export_hf(checkpoint, tmp_path / "model", max_shard_bytes=limit)
    shards = sorted(output.glob("*.safetensors"))
    assert [s.name for s in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    merged: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit
        merged |= tensors
    index = read(output / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    assert all(name in load_file(output / file) for name, file in list(index["weight_map"].items())[::50])
    assert index["weight_map"].keys() == merged.keys() == load_file(checkpoint / "model.safetensors").keys()
    check_whole(output)
    again = export_hf(output, tmp_path / "again")  # and back into one file
    assert load_file(again / "model.safetensors").keys() == merged.keys()


def test_what_cannot_be_written_is_not_said_to_be_unreadable(
    checkpoint: Path, tmp_path: Path, small_files: None
) -> None:
    with pytest.raises(ValueError, match=r"^model\.safetensors: cannot be written: .*File too large"):
        export_hf(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_config_has_what_other_readers_need(exported: Path) -> None:
    config = read(exported / "config.json")
    expected = {
        "rope_theta": 1e7,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "head_dim": 32,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "dtype": "float32",
        "n_group": 1,
        "topk_group": 1,
        "bos_token_id": None,
        "architectures": ["Dots1ForCausalLM"],
        "model_type": "dots1",
        "use_cache": True,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 1e7
    assert Dots1Config.from_pretrained(exported).rope_parameters["rope_theta"] == 1e7


def test_null_groups_become_one(
    checkpoint: Path, tmp_path: Path, edited_copy: Callable[[Path, str, Callable[[str], str]], Path]
) -> None:
    def edit(text: str) -> str:
        return re.sub(r'"(n_group|topk_group)": 1', r'"\1": null', text)

    config = read(export_hf(edited_copy(checkpoint, "config.json", edit), tmp_path / "out") / "config.json")
    assert (config["n_group"], config["topk_group"]) == (1, 1)


def test_generation_stops_at_every_end(checkpoint: Path, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    generation = read(exported / "generation_config.json")
    ends = {tokenizer.convert_tokens_to_ids(t) for t in ("<|endofresponse|>", "<|endoftext|>")}
    assert set(generation["eos_token_id"]) == ends
    assert generation["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert "bos_token_id" not in generation


def test_tokenizer_is_written_for_old_and_new_readers(checkpoint: Path, exported: Path) -> None:
    fields = read(exported / "tokenizer_config.json")
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["bos_token"] is None
    assert fields["add_bos_token"] is False
    assert "<|response|>" in fields["additional_special_tokens"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & fields.keys()
    source, plain = AutoTokenizer.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(exported)
    assert {int(i): t["content"] for i, t in fields["added_tokens_decoder"].items()} == {
        i: t.content for i, t in source.added_tokens_decoder.items()
    }
    assert set(plain.all_special_tokens) == set(source.all_special_tokens)
    text = "Tom has 12 apples.\n小明有3个苹果 <|response|>42 ，\U0001f600<|endofresponse|>"
    assert plain(text)["input_ids"] == source(text)["input_ids"]
    assert plain.decode(plain(text)["input_ids"]) == source.decode(source(text)["input_ids"])


def test_template_is_in_both_places_without_generation_tags(exported: Path) -> None:
    template = (exported / "chat_template.jinja").read_text(encoding="utf-8")
    assert read(exported / "tokenizer_config.json")["chat_template"] == template
    assert "<|endofresponse|>" in template
    assert not re.search(r"\{%[-+]?\s*(end)?generation", template)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_template_renders_as_before(
    checkpoint: Path, exported: Path, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    source, plain = (AutoTokenizer.from_pretrained(d) for d in (checkpoint, exported))
    assert source.chat_template == CHAT_TEMPLATE
    ours, theirs = (
        t.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        for t in (source, plain)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "template",
    [
        "A {% generation %} b {% endgeneration %} C",
        "A {%- generation -%} b {%- endgeneration -%} C",
        "A\n  {% generation %}\n  b\n  {% endgeneration %}\nC",
        "A\n {%- generation %}\n b\n {%- endgeneration %}\n C",
        "{{ 1 }}{%generation%}{{ 2 }}{%endgeneration%}{{ 3 }}",
        "{{ 1 -}} {% generation -%} {{ 2 }} {%- endgeneration %} {{- 3 }}",
        "{% for m in messages %}\n{%+ generation %}\nx\n{% endgeneration %}\n{% endfor %}\nend",
    ],
)
def test_removing_the_tags_keeps_white_space(checkpoint: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    portable = portable_template(template)
    assert not re.search(r"\{%[-+]?\s*(end)?generation", portable)
    before, after = (
        tokenizer.apply_chat_template(CONVERSATIONS[2], chat_template=t, tokenize=False) for t in (template, portable)
    )
    assert before == after


def test_adapter_is_merged(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    output = export_hf(adapter, tmp_path / "model")
    assert not list(output.glob("adapter*"))
    base, merged = load_file(checkpoint / "model.safetensors"), load_file(output / "model.safetensors")
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert changed == {n for n in base if n.endswith(("q_proj.weight", "v_proj.weight"))}
    ours, _ = load_model(ModelSection(path=str(adapter)))
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(ours.state_dict()[name], merged[name])
    assert [s["stage"] for s in read(output / "manifest.json")["training"]["stages"]] == ["sft", "dpo"]


def test_bfloat16_stays_and_the_bias_is_fp32(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(ModelSection(path=str(checkpoint), dtype="bfloat16"))
    save_model(model, tokenizer, tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    rounded = {n: t.bfloat16() if n.endswith("correction_bias") else t for n, t in stored.items()}
    save_file(rounded, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    output = export_hf(tmp_path / "half", tmp_path / "model")
    tensors = load_file(output / "model.safetensors")
    assert {str(t.dtype) for n, t in tensors.items() if n.endswith("correction_bias")} == {"torch.float32"}
    assert {str(t.dtype) for n, t in tensors.items() if not n.endswith("correction_bias")} == {"torch.bfloat16"}
    assert read(output / "config.json")["torch_dtype"] == "bfloat16"


def test_nothing_of_this_machine_is_in_the_files(adapter: Path, tmp_path: Path) -> None:
    output = export_hf(adapter, tmp_path / "model")
    for path in output.iterdir():
        content = path.read_bytes()
        assert str(adapter.parents[2]).encode() not in content, path.name
        assert str(tmp_path).encode() not in content, path.name
        if path.name not in ("model.safetensors", "tokenizer.json"):  # whose bytes and tokens may hold anything
            assert b'"/' not in content.replace(b'"/no_think be brief"', b""), path.name
    sft = read(output / "manifest.json")["training"]["stages"][0]["recipe"]
    assert sft["data"] == {"path": "data.jsonl", "system_prompt": "/no_think be brief"}


def test_files_can_be_read_by_others(exported: Path) -> None:
    assert len({p.stat().st_mode for p in exported.iterdir()}) == 1


def test_manifest_seals_every_file(exported: Path) -> None:
    check_whole(exported)
    assert read(exported / "manifest.json")["stage"] == "export"
    assert read(exported / "manifest.json")["files"].keys() == {p.name for p in exported.iterdir()} - {
        "manifest.json",
        "README.md",  # a model card may be edited
    }


class TestOutput:
    """What an export may and may not replace."""

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_something_else_is_never_replaced(self, checkpoint: Path, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(ValueError, match="is not an export; choose another"):
            export_hf(checkpoint, tmp_path, overwrite)
        with pytest.raises(ValueError, match="is not an export; choose another"):
            export_hf(checkpoint, tmp_path / "notes.txt", overwrite)
        assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]

    def test_an_earlier_export_is_replaced_only_if_asked(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()  # empty: nothing to lose
        output = export_hf(checkpoint, tmp_path / "model")
        (output / "marker").touch()
        with pytest.raises(ValueError, match="holds an earlier export"):
            export_hf(checkpoint, output)
        assert (output / "marker").exists()
        export_hf(checkpoint, output, overwrite=True)
        assert not (output / "marker").exists()

    def test_source_and_output_are_apart(self, checkpoint: Path, tmp_path: Path) -> None:
        exported = export_hf(checkpoint, tmp_path / "a" / "model")
        for output in (exported, exported / "inside", tmp_path / "a"):
            with pytest.raises(ValueError, match="choose another output directory"):
                export_hf(exported, output, overwrite=True)

    def test_the_base_of_an_adapter_is_not_replaced(self, checkpoint: Path, adapter: Path) -> None:
        with pytest.raises(ValueError, match="choose another output directory"):
            export_hf(adapter, checkpoint, overwrite=True)

    def test_a_failing_check_publishes_nothing(self, checkpoint: Path, tmp_path: Path) -> None:
        output = export_hf(checkpoint, tmp_path / "model")
        before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}

        def check(directory: Path) -> dict:
            assert (directory / "model.safetensors").is_file()
            raise ValueError(f"{directory}: not the same")

        with pytest.raises(ValueError, match=rf"^{re.escape(str(output))}: not the same \(nothing was exported\)$"):
            export_hf(checkpoint, output, overwrite=True, finish=check)
        assert {p.name: p.stat().st_mtime_ns for p in output.iterdir()} == before
        with pytest.raises(ValueError, match="not the same"):
            export_hf(checkpoint, tmp_path / "new", finish=check)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


class TestDamagedSource:
    """A damaged checkpoint is refused, and leaves nothing behind."""

    def copied(self, checkpoint: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path / "source"))

    def refused(self, source: Path, tmp_path: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            export_hf(source, tmp_path / "model")
        assert [p.name for p in tmp_path.iterdir()] == ["source"]

    def test_truncated(self, checkpoint: Path, tmp_path: Path) -> None:
        source = self.copied(checkpoint, tmp_path)
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refused(source, tmp_path, "model.safetensors has .* bytes, manifest.json says")
        (source / "manifest.json").unlink()
        self.refused(source, tmp_path, "cannot be read")

    def test_missing_file(self, checkpoint: Path, tmp_path: Path) -> None:
        source = self.copied(checkpoint, tmp_path)
        (source / "tokenizer.json").unlink()
        self.refused(source, tmp_path, "tokenizer.json is missing")

    @pytest.mark.parametrize(
        ("lost", "added", "match"),
        [
            ("model.layers.2.mlp.gate.e_score_correction_bias", None, "e_score_correction_bias is missing"),
            ("model.layers.1.mlp.experts.7.up_proj.weight", None, "experts.7.up_proj.weight is missing"),
            (None, "model.extra.weight", "model.extra.weight is unknown"),
            ("lm_head.weight", "lm_head.weight", "lm_head.weight has shape"),
        ],
    )
    def test_lost_or_foreign_tensor(
        self, checkpoint: Path, tmp_path: Path, lost: str | None, added: str | None, match: str
    ) -> None:
        source = self.copied(checkpoint, tmp_path)
        (source / "manifest.json").unlink()
        tensors = load_file(source / "model.safetensors")
        if lost:
            del tensors[lost]
        if added:
            tensors[added] = torch.zeros(3)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        self.refused(source, tmp_path, match)

    def test_no_chat_template(self, checkpoint: Path, tmp_path: Path) -> None:
        source = self.copied(checkpoint, tmp_path)
        (source / "manifest.json").unlink()
        (source / "chat_template.jinja").unlink()
        self.refused(source, tmp_path, "chat template")


def test_plain_tokenizer_class_of_transformers_reads_it(exported: Path) -> None:
    assert PreTrainedTokenizerFast.from_pretrained(exported).eos_token == "<|endofresponse|>"
