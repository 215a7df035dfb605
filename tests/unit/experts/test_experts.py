"""`dots-align experts`: loads counted as transformers routes, measures by hand, how checkpoints are compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dots1ForCausalLM, PreTrainedTokenizerFast

from dots_align import cli
from dots_align.experts import measures
from dots_align.experts.analysis import analyse
from dots_align.experts.domains import Domain, parse_domain, parse_domains, token_ids
from dots_align.experts.routing import Routes, differences, record
from dots_align.experts.weights import weight_change

TEXTS = ["1+1=2", "The quick brown fox jumps over the lazy dog.", "二加二等于四", "x" * 40]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def domains(tmp_path: Path) -> list[Domain]:
    digits = write(tmp_path / "digits.jsonl", *({"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(30)))
    words = write(tmp_path / "words.jsonl", *({"text": text} for text in TEXTS))
    return parse_domains([f"{digits}:question,answer", f"words={words}"])


def transformers_counts(directory: Path, sequences: list[list[int]]) -> np.ndarray:
    """By hand: transformers' plain model, a sequence at a time; the router's formula on what enters each MoE block."""
    model: Any = Dots1ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    seen: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    counts = np.zeros((len(blocks), model.config.n_routed_experts), dtype=np.int64)
    for ids in sequences:
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        for row, (block, hidden) in enumerate(zip(blocks, seen, strict=True)):
            scores = torch.sigmoid(hidden[0].float() @ block.gate.weight.float().T)
            chosen = (scores + block.gate.e_score_correction_bias).topk(model.config.num_experts_per_tok).indices
            counts[row] += np.bincount(chosen.ravel().numpy(), minlength=counts.shape[1])
    return counts


def test_counts_are_those_of_transformers_own_router(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, domains: list[Domain]
) -> None:
    found = analyse([model_dir], domains)

    assert (found.layers, found.num_experts, found.experts_per_token) == ([1, 2], 16, 3)
    (checkpoint,) = found.checkpoints
    for domain in domains:
        sequences = list(token_ids(domain, tokenizer, 10**6, 256))
        assert np.array_equal(checkpoint.counts[domain.name], transformers_counts(model_dir, sequences))
        assert found.tokens[domain.name] == sum(map(len, sequences))
        assert (checkpoint.counts[domain.name].sum(-1) == 3 * found.tokens[domain.name]).all()


def test_many_batches_count_as_one(model: Dots1ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [[(7 * i + j) % 500 for j in range(3 + i % 9)] for i in range(40)]
    whole = record(model, sequences, tmp_path / "whole")
    monkeypatch.setattr("dots_align.experts.routing.BATCH_TOKENS", 16)
    monkeypatch.setattr("dots_align.experts.routing.CHUNK", 7)
    pieces = record(model, sequences, tmp_path / "pieces")

    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()
    assert np.array_equal(whole.counts(16), pieces.counts(16))


def routes(path: Path, rows: list[list[list[int]]]) -> Routes:
    table = np.array(rows, dtype=np.uint8)
    path.write_bytes(table.tobytes())
    return Routes(path, *table.shape[1:])


def test_differences_between_routes(tmp_path: Path) -> None:
    one = routes(tmp_path / "a", [[[0, 1], [2, 3]], [[4, 5], [0, 1]], [[1, 2], [3, 4]], [[0, 7], [5, 6]]])
    other = routes(tmp_path / "b", [[[1, 0], [2, 3]], [[4, 6], [2, 3]], [[1, 2], [3, 4]], [[6, 5], [6, 5]]])

    shift, overlap = differences(one, other)

    assert shift.tolist() == [0.5, 0.25]  # the order of experts does not matter
    assert overlap.tolist() == [(1 + 0.5 + 1 + 0) / 4, (1 + 0 + 1 + 1) / 4]


def test_measures_by_hand() -> None:
    counts = np.array([[[4, 0, 0, 0], [1, 1, 1, 1]], [[0, 0, 2, 2], [1, 1, 1, 1]]])  # [domains, layers, experts]
    share = measures.shares(counts)

    assert measures.max_violation(share).tolist() == [[3.0, 0.0], [1.0, 0.0]]
    assert measures.entropy(share) == pytest.approx(np.array([[0, 1], [0.5, 1]]))
    assert measures.divergence(share).tolist() == pytest.approx([1, 0])  # nothing shared; all the same
    assert measures.similarity(share) == pytest.approx(np.array([[1, 0.5], [0.5, 1]]))
    best, second, third = measures.specialists(share)
    assert (best.layer, best.expert, best.domain, best.load, best.elsewhere) == (0, 0, 0, 4.0, 0.0)
    assert best.weight == pytest.approx(np.log(2))
    assert {(s.layer, s.expert, s.domain, s.load) for s in (second, third)} == {(0, 2, 1, 2.0), (0, 3, 1, 2.0)}


def test_domains_weigh_the_same_whatever_their_size() -> None:
    small, large = np.array([[9, 1]]), np.array([[1_000, 9_000]])
    one = measures.shares(np.stack([small, large]))
    other = measures.shares(np.stack([small * 500, large]))
    assert measures.divergence(one) == pytest.approx(measures.divergence(other))


@pytest.fixture
def moved(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint with one expert doubled, one row of the router turned, and one bias moved."""
    directory = tmp_path / "checkpoint-7"
    shutil.copytree(model_dir, directory)
    (directory / "manifest.json").unlink()
    weights = load_file(directory / "model.safetensors")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        weights[f"model.layers.1.mlp.experts.5.{projection}.weight"] *= 2
    weights["model.layers.2.mlp.gate.weight"][3] *= -1
    weights["model.layers.2.mlp.gate.e_score_correction_bias"][4] += 0.25
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_weight_change_of_each_expert(model_dir: Path, moved: Path) -> None:
    found = weight_change(model_dir, moved, [1, 2], 16)

    wanted = np.zeros((3, 2, 16))
    wanted[0, 0, 5], wanted[1, 1, 3], wanted[2, 1, 4] = 1.0, 2.0, 0.25
    assert np.stack([found.experts, found.router, found.bias]) == pytest.approx(wanted, abs=1e-6)


def test_the_command_compares_checkpoints(
    model_dir: Path, moved: Path, domains: list[Domain], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"{domains[0].path}:question,answer", f"words={domains[1].path}"]
    page = tmp_path / "out" / "page.html"
    cli.main(["experts", str(model_dir), str(moved), "--data", *data, "--output", str(page), "--max-tokens", "90"])

    said = capsys.readouterr().out
    values = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert "checkpoint-7: 2 MoE layers x 16 experts, 3 a token" in said
    assert "digits" in said
    assert said.rstrip().endswith(str(page))
    assert [one["tokens"] for one in values["domains"]] == [90, min(90, values["domains"][1]["tokens"])]
    first, last = values["checkpoints"]
    assert (first["shifts"], last["step"]) == ([], 7)
    (shift,) = last["shifts"]
    assert shift["from"] == "model"
    assert shift["shift"]["words"][0] == 0  # what layer 1 routes has not changed yet
    assert 0 < shift["shift"]["words"][1] <= 1
    assert values["change"]["experts"][0][5] == 1.0
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in last["load"]["words"])
    text = page.read_text(encoding="utf-8")
    assert "http-equiv" in text
    assert values["verdict"] in said


def test_json_is_printed_if_asked_for(
    model_dir: Path, domains: list[Domain], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    cli.main(["experts", str(model_dir), "--data", domains[1].path, "--output", str(page), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert (printed["change"], printed["checkpoints"][0]["specialists"]) == (None, [])  # one checkpoint, one domain
    for wrong in (tmp_path, tmp_path / "page.txt"):
        with pytest.raises(SystemExit, match=r"name the file|is an \.html file"):
            cli.main(["experts", str(model_dir), "--data", domains[1].path, "--output", str(wrong)])


def test_a_run_stands_for_all_of_its_checkpoints(model_dir: Path, domains: list[Domain], tmp_path: Path) -> None:
    for step in (2, 10):
        shutil.copytree(model_dir, tmp_path / "run" / f"checkpoint-{step}")
    found = analyse([model_dir, tmp_path / "run"], domains[1:])
    assert [one.name for one in found.checkpoints] == ["model", "checkpoint-2", "checkpoint-10"]
    assert [shift.other for shift in found.checkpoints[2].shifts] == ["model", "checkpoint-2"]
    assert all((shift.shift["words"] == 0).all() for shift in found.checkpoints[2].shifts)


def test_domains_on_the_command_line() -> None:
    assert parse_domain("maths=data/gsm8k/test.jsonl:question,answer") == Domain(
        "maths", "data/gsm8k/test.jsonl", ("question", "answer")
    )
    assert parse_domain("data/a=b.jsonl") == Domain("a=b", "data/a=b.jsonl")
    assert parse_domain("toy=synthetic:sft") == Domain("toy", "synthetic:sft")
    with pytest.raises(ValueError, match="two domains are called 'x'"):
        parse_domains(["a/x.jsonl", "b/x.jsonl"])


def test_what_a_record_says(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    path = write(tmp_path / "mixed.jsonl", {"messages": talk}, {"prompt": "1+1?", "response": "2"}, {"text": "plain"})
    first, second, third = token_ids(Domain("mixed", str(path)), tokenizer, 10**6, 256)
    assert first == second
    assert tokenizer.decode(first).endswith("<|userprompt|>1+1?<|endofuserprompt|><|response|>2<|endofresponse|>")
    assert tokenizer.decode(third) == "plain"
    cut = list(token_ids(Domain("mixed", str(path)), tokenizer, 12, 8))
    assert [len(ids) for ids in cut] == [8, 4]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"question": "?"}], (), r"which fields are its text\? It has question; write FILE:FIELD"),
        ([{"text": "a"}], ("txt",), "no text in field 'txt'"),
        ([{"messages": "hello"}], (), "'messages' is not a list"),
        ([], (), "holds no text"),
    ],
)
def test_records_without_text_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: list[Any], fields: tuple[str, ...], message: str
) -> None:
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        list(token_ids(Domain("bad", str(path), fields), tokenizer, 100, 100))


def test_another_model_cannot_be_compared(model_dir: Path, domains: list[Domain], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    (other / "manifest.json").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    with pytest.raises(ValueError, match="only checkpoints of one model can be compared"):
        analyse([model_dir, other], domains)
