"""The release gates: one failure of each kind, and the mark of a checkpoint that passes them all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dots_align import cli
from dots_align.config import ReleaseRecipe, load_recipe
from dots_align.export.gguf import write_gguf
from dots_align.export.hf import export_hf
from dots_align.release import command
from dots_align.release.command import is_released, recipe_for, release
from dots_align.release.gates import (
    Gate,
    check_thresholds,
    evaluation_gates,
    leak_gate,
    parity_gate,
    reload_gate,
    template_gate,
)
from dots_align.release.leaks import find_leaks

VALUES = {
    "stage": "release",
    "evaluation": {"data": {"path": "synthetic:heldout"}, "num_prompts": 4, "max_tokens": 4},
    "min_stop_rate": 0.0,
}


def recipe(**values: Any) -> ReleaseRecipe:
    return ReleaseRecipe.model_validate({**VALUES, **values})


@pytest.fixture(scope="module")
def exported(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(model_dir, tmp_path_factory.mktemp("release") / "export")


@pytest.fixture
def edited(exported: Path, tmp_path: Path) -> Callable[[str, Callable[[str], str]], Path]:
    """A copy of the export with one text file changed."""

    def edit(name: str, change: Callable[[str], str]) -> Path:
        target = tmp_path / "edited"
        shutil.copytree(exported, target)
        text = (target / name).read_text(encoding="utf-8")
        assert change(text) != text
        (target / name).write_text(change(text), encoding="utf-8")
        return target

    return edit


@pytest.mark.slow
def test_a_checkpoint_that_passes_every_gate_is_marked_until_it_is_changed(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, path = tmp_path / "released", tmp_path / "release.yaml"
    path.write_text(json.dumps(VALUES), encoding="utf-8")
    cli.main(["release", str(model_dir), "thresholds.exact_match=0.0", "--recipe", str(path), "--output", str(output)])
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(output / "RELEASE.json")
    record = json.loads((output / "RELEASE.json").read_text(encoding="utf-8"))
    gates = record["gates"]
    assert list(gates) == ["export", "reload", "parity", "evaluation", "stop_rate", "template", "leaks"]
    assert record["released"]
    assert all(gate["ok"] for gate in gates.values())
    assert gates["reload"]["verification"]["num_identical"] > 0
    assert gates["parity"]["verdict"].startswith("PARITY")
    assert gates["evaluation"]["metrics"].keys() >= {"exact_match", "stop_rate", "mean_length"}
    assert gates["template"]["num_rendered_alike"] == 10
    assert str(tmp_path) not in json.dumps(record)
    assert is_released(output)
    with pytest.raises(ValueError, match="is there already"):
        release(model_dir, output, recipe())
    manifest = output / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert not is_released(output)


def test_export_gate(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "checkpoint-1"
    shutil.copytree(model_dir, broken, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "release.yaml"
    path.write_text(json.dumps(VALUES), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["release", str(broken), "--recipe", str(path)])
    assert stopped.value.code == 1
    record = json.loads((tmp_path / "checkpoint-1-release.failed.json").read_text(encoding="utf-8"))
    assert not record["released"]
    assert "e_score_correction_bias is missing" in record["gates"]["export"]["reasons"][0]
    assert not (tmp_path / "checkpoint-1-release").exists()


def test_a_failed_gate_leaves_no_mark_but_every_figure(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def gates(*_: Any) -> list[Gate]:
        export_hf(model_dir, output)
        return [Gate("export"), Gate("evaluation", ["too low"], {"metrics": {"exact_match": 0.1}}), Gate("leaks")]

    monkeypatch.setattr(command, "_pass_gates", gates)
    path, ok = release(model_dir, output, recipe())
    assert (path, ok) == (tmp_path / "out.failed.json", False)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["gates"]["evaluation"] == {"ok": False, "reasons": ["too low"], "metrics": {"exact_match": 0.1}}
    assert not found["released"]
    assert not (output / "RELEASE.json").exists()
    assert not is_released(output)


def test_reload_gate(exported: Path, edited: Callable[..., Path]) -> None:
    """Nobody but llama.cpp can say that a GGUF file is right; where it is missing, that is the failure."""
    assert reload_gate(exported).reasons == ["no fresh process has loaded it"]
    proofs = {"verification": {"num_identical": 5}, "gguf": {"F16": {"skipped": "llama.cpp is missing"}}}
    directory = edited("manifest.json", lambda text: json.dumps({**json.loads(text), **proofs}))
    assert reload_gate(directory).reasons == ["gguf:F16: llama.cpp is missing"]


@pytest.mark.slow
def test_parity_gate(model_dir: Path, edited: Callable[..., Path]) -> None:
    """An export that is whole and answers, but with another rotary base than the checkpoint."""
    gate = parity_gate(model_dir, edited("config.json", lambda text: text.replace("10000000.0", "10000.0")))
    assert gate.reasons[0].startswith("NO PARITY: exported copy: wrong rope_theta")
    assert len(gate.figures["engines"]) >= 6


def test_stop_rate_and_evaluation_gates(exported: Path, tmp_path: Path) -> None:
    asked = recipe(thresholds={"exact_match": 0.25}, min_stop_rate=0.9)
    evaluation, stop = evaluation_gates(exported, asked, tmp_path / "eval.json")
    assert evaluation.reasons == ["exact_match is 0, at least 0.25 is asked for"]
    assert stop.reasons == ["stop_rate is 0, at least 0.9 is asked for"]
    assert evaluation.figures["num_prompts"] == 4


TASKS = {**VALUES["evaluation"], "tasks": {"names": ["gsm8k"]}}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"thresholds": {"exact_mach": 0.9}},
            "no such metric; did you mean exact_match?",
        ),
        (
            {"thresholds": {"bleu": 0.9}},
            "thresholds.bleu: the evaluation has no such metric; there are exact_match,",
        ),
        ({"thresholds": {"gsm8k/acuracy": 0.9}, "evaluation": TASKS}, "did you mean gsm8k/accuracy?"),
        (
            {"thresholds": {"exact_match": 85}},
            "thresholds.exact_match=85: exact_match is a share; give a number ",
        ),
        ({"thresholds": {"mean_length": float("nan")}}, "thresholds.mean_length=nan: give the number"),
        ({"evaluation": {"data": {"path": "nowhere.jsonl"}}}, "nowhere.jsonl: no such file"),
        ({"evaluation": {**VALUES["evaluation"], "scorer": "reward_models.math:boxed"}}, "evaluation.scorer"),
    ],
)
def test_what_no_checkpoint_can_reach_is_refused_before_anything_is_made(
    model_dir: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        release(model_dir, tmp_path / "out", recipe(**values))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_the_gates(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: results cannot be written there; give --output"):
        release(model_dir, tmp_path / "file" / "out", recipe())


def test_a_threshold_of_a_task_that_is_asked_is_taken() -> None:
    check_thresholds(recipe(evaluation=TASKS, thresholds={"gsm8k/accuracy": 0.3, "mean_length": 20, "stop_rate": 1}))


def test_template_gate(exported: Path, edited: Callable[..., Path]) -> None:
    assert template_gate(exported).ok
    gate = template_gate(edited("chat_template.jinja", lambda text: text.replace("<|userprompt|>", "\n<|userprompt|>")))
    assert len(gate.reasons) == 1
    assert gate.reasons[0].startswith("chat_template.jinja renders 'What is 17 plus 25?' other than the dots layout")


def test_template_gate_wants_a_turn_to_end(edited: Callable[..., Path]) -> None:
    directory = edited(
        "generation_config.json", lambda text: text.replace('"eos_token_id": [', '"eos_token_id": [3],"x":[')
    )
    assert "stops at [3], an answer ends with" in template_gate(directory).reasons[0]


# Joined here, so that nobody who searches this file for credentials finds one.
SECRETS = {
    "a Hugging Face token": "hf" + "_" + "a1B2" * 9,
    "an OpenAI or Anthropic key": "sk" + "-proj-" + "x9" * 20,
    "a GitHub token": "ghp" + "_" + "Z" * 36,
    "an AWS key": "AKIA" + "Q" * 16,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a password in an address": "https://me:" + "hunter2@example.org/x",
    "a token in a setting": '"wandb_api_key": "' + "0123456789abcdef" * 2 + '"',
    "a personal path": "/home/" + "someone/data/train.jsonl",
    "a temporary path": "/tmp/" + "run7/checkpoint",
}


@pytest.mark.parametrize("what", SECRETS)
def test_leak_gate(exported: Path, edited: Callable[..., Path], what: str) -> None:
    directory = edited("README.md", lambda text: text + "\nsee " + SECRETS[what])
    (reason,) = leak_gate(directory).reasons
    assert reason.startswith(f"README.md: {what}: ")
    assert SECRETS[what] not in reason  # the finding must not leak it either


def test_what_an_export_holds_by_itself_is_no_leak(exported: Path) -> None:
    gate = leak_gate(exported)
    assert gate.ok, gate.reasons
    assert gate.figures["num_files"] >= 7


def test_headers_of_weights_are_searched(edited: Callable[..., Path], exported: Path) -> None:
    directory = edited("chat_template.jinja", lambda text: text.replace("You are", "/home/" + "me/x You are"))
    template = directory / "tokenizer_config.json"
    template.write_text((exported / "tokenizer_config.json").read_text(encoding="utf-8"), encoding="utf-8")
    write_gguf(directory, directory / "model-F16.gguf", "F16")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", "from": "/Users/" + "me/run"})
    found = {line.partition(":")[0] for line in find_leaks(directory)}
    assert found == {"chat_template.jinja", "model-F16.gguf", "model.safetensors"}


def test_the_recipe_is_that_of_training_where_none_is_given(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was not trained with an evaluation; give one with --recipe"):
        recipe_for(model_dir, None, [])
    manifest = {"stage": "sft", "recipe": {"seed": 3, "evaluation": VALUES["evaluation"]}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = recipe_for(tmp_path, None, ["thresholds.exact_match=0.5"])
    assert (found.seed, found.evaluation.num_prompts, found.thresholds) == (3, 4, {"exact_match": 0.5})
    with pytest.raises(ValueError, match="min_stop_rate"):
        recipe_for(tmp_path, None, ["min_stop_rate=2"])


def test_a_release_without_the_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "release.yaml"
    path.write_text(json.dumps({**VALUES, "targets": ["gguf:F16"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="hf has to be among them"):
        load_recipe(path, [], "release")
