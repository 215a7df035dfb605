"""The proof behind an export: what passes, and that each way of losing something does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dots_align.checkpoint import load_model
from dots_align.config import ModelSection
from dots_align.data.chat import encode_prompt, stop_token_ids
from dots_align.export import verify
from dots_align.export.hf import export_hf
from dots_align.export.targets import export
from dots_align.export.verify import ask_fresh_process, verify_export
from dots_align.types import Message

PROMPTS = ["What is 17 plus 25?", "小明有32个苹果，又买了9个，现在有几个？", "Add 3 and 4."]
NOT_THE_SAME = r"does not answer like its checkpoint|log-probabilities differ"
Edit = Callable[[Path, str, Callable[[str], str]], Path]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(checkpoint, tmp_path_factory.mktemp("out") / "model")


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> dict[str, Any]:
    """What a faithful export answers, made from the checkpoint itself: for tests that need no second process."""
    model, tokenizer = load_model(ModelSection(path=str(checkpoint)))
    prompt_ids = [encode_prompt(tokenizer, [Message("user", p)]) for p in PROMPTS]
    samples = verify.greedy(model, tokenizer, prompt_ids)
    return {
        "answers": [
            {"prompt_ids": ids, "response_ids": s.response_ids, "logprobs": s.logprobs}
            for ids, s in zip(prompt_ids, samples, strict=True)
        ],
        "eos_token_ids": list(stop_token_ids(tokenizer)),
        "pad_token_id": tokenizer.pad_token_id,
        "problems": [],
    }


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, truth: dict[str, Any]) -> dict[str, Any]:
    """A copy of `truth` that takes the place of the fresh process; tests change it."""
    result = json.loads(json.dumps(truth))
    monkeypatch.setattr(verify, "_reload", lambda *_: result)
    return result


ENDINGS = {
    "aborts": """print('{"said": 1}', flush=True); os.abort()""",
    "says half of it": """print('{"said":'); sys.exit("no more")""",
    "says nothing": """sys.exit("no more")""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_answer_counts_however_its_process_ends_afterwards(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\n{ENDINGS[ending]}\n")
    if ending == "aborts":
        assert ask_fresh_process(script, {}, "failed") == {"said": 1}
        return
    with pytest.raises(ValueError, match=r"^failed: no more$"):
        ask_fresh_process(script, {}, "failed")


def test_adapter_export_is_published_with_its_proof(adapter: Path, tmp_path: Path) -> None:
    output = export(adapter, tmp_path / "model")
    proof = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["verification"]
    assert proof["num_prompts"] == len(verify.CONVERSATIONS)
    assert proof["num_identical"] + len(proof["ties"]) == proof["num_prompts"]
    assert proof["median_logprob_difference"] < 1e-5
    assert "greedy answers identical" in (output / "README.md").read_text(encoding="utf-8")


def test_lost_correction_bias_is_noticed(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=NOT_THE_SAME):
        verify_export(checkpoint, broken)


def test_missing_tensor_is_not_filled_in(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"reports missing tensor model.layers.2.mlp.gate.e_score_correction_bias"):
        verify_export(checkpoint, broken, PROMPTS[:1])


def test_other_rope_theta_is_noticed(checkpoint: Path, exported: Path, edited_copy: Edit) -> None:
    broken = edited_copy(exported, "config.json", lambda t: re.sub(r'("rope_theta": )10000000\.0', r"\g<1>10000.0", t))
    with pytest.raises(ValueError, match=NOT_THE_SAME):
        verify_export(checkpoint, broken)


def test_other_template_is_noticed(checkpoint: Path, exported: Path, edited_copy: Edit) -> None:
    broken = edited_copy(exported, "chat_template.jinja", lambda t: t.replace("helpful assistant", "helpful robot"))
    with pytest.raises(ValueError, match=r"'Add 3 and 4.' is rendered to other tokens"):
        verify_export(checkpoint, broken, ["Add 3 and 4."])


def test_unreadable_directory_is_one_line(checkpoint: Path, exported: Path, edited_copy: Edit) -> None:
    broken = edited_copy(exported, "config.json", lambda _: "{")
    with pytest.raises(ValueError, match="plain transformers cannot load and run it: ") as error:
        verify_export(checkpoint, broken, PROMPTS[:1])
    assert "\n" not in str(error.value)


def test_faithful_answers_pass(checkpoint: Path, exported: Path, answering: dict[str, Any]) -> None:
    result = verify_export(checkpoint, exported, PROMPTS)
    assert result["num_identical"] == result["num_prompts"] == 3
    assert result["num_tokens"] == sum(len(a["response_ids"]) for a in answering["answers"])
    assert (result["first_disagreement"], result["ties"]) == (None, [])


def test_first_other_token_is_named(checkpoint: Path, exported: Path, answering: dict[str, Any]) -> None:
    answer = next(a for a in answering["answers"] if len(a["response_ids"]) > 4)
    answer["response_ids"][4] = (answer["response_ids"][4] + 1) % 495
    prompt = re.escape(repr(PROMPTS[answering["answers"].index(answer)]))
    with pytest.raises(ValueError, match=rf"prompt {prompt}, response position 4: token \d+ instead of"):
        verify_export(checkpoint, exported, PROMPTS)


@pytest.mark.parametrize("cut", [True, False])
def test_other_end_is_named(checkpoint: Path, exported: Path, answering: dict[str, Any], cut: bool) -> None:
    answer = max(answering["answers"], key=lambda a: len(a["response_ids"]))
    length = len(answer["response_ids"])
    answer["response_ids"] = answer["response_ids"][:-1] if cut else [*answer["response_ids"], 7]
    answer["logprobs"] = answer["logprobs"][:-1] if cut else [*answer["logprobs"], -1.0]
    match = f"{length - 1}: the end instead of token" if cut else f"{length}: token 7 instead of the end"
    with pytest.raises(ValueError, match=match):
        verify_export(checkpoint, exported, PROMPTS)


def test_same_tokens_with_other_probabilities_are_refused(
    checkpoint: Path, exported: Path, answering: dict[str, Any]
) -> None:
    for answer in answering["answers"]:
        answer["logprobs"] = [value + 1e-3 for value in answer["logprobs"]]
    with pytest.raises(ValueError, match=r"log-probabilities differ by 1\.0e-03"):
        verify_export(checkpoint, exported, PROMPTS)


def test_stop_and_padding_tokens_are_compared(checkpoint: Path, exported: Path, answering: dict[str, Any]) -> None:
    answering["pad_token_id"] = None
    with pytest.raises(ValueError, match="pads with None"):
        verify_export(checkpoint, exported, PROMPTS)
    answering["eos_token_ids"] = answering["eos_token_ids"][:1]
    with pytest.raises(ValueError, match="stops at token ids"):
        verify_export(checkpoint, exported, PROMPTS)


def test_near_tie_is_reported_not_refused(
    checkpoint: Path, exported: Path, tmp_path: Path, answering: dict[str, Any]
) -> None:
    """Two rows of the head made equal: their tokens have the same logit everywhere, and either is a right answer."""
    twin = Path(shutil.copytree(checkpoint, tmp_path / "twin"))
    answer = max(answering["answers"], key=lambda a: len(set(a["response_ids"])))
    chosen = answer["response_ids"][2]
    said = {t for a in answering["answers"] for t in a["response_ids"]}
    other = next(t for t in range(chosen + 1, 490) if t not in said)
    tensors = load_file(twin / "model.safetensors")
    tensors["lm_head.weight"][other] = tensors["lm_head.weight"][chosen]
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_model(ModelSection(path=str(twin)))
    samples = verify.greedy(model, tokenizer, [a["prompt_ids"] for a in answering["answers"]])
    for a, sample in zip(answering["answers"], samples, strict=True):
        a["response_ids"], a["logprobs"] = list(sample.response_ids), sample.logprobs
    position = answer["response_ids"].index(chosen)
    answer["response_ids"][position] = other
    result = verify_export(twin, exported, PROMPTS)
    assert result["num_identical"] == 2
    assert result["first_disagreement"] == result["ties"][0]
    assert result["ties"][0] == {
        "prompt": PROMPTS[answering["answers"].index(answer)],
        "position": position,
        "checkpoint": chosen,
        "exported": other,
    }
