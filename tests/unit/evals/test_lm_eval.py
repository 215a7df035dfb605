"""lm-evaluation-harness on our engine, against its own back end for transformers models. Skipped where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dots_align.checkpoint import load_model
from dots_align.config import ModelSection
from dots_align.evals.lm_eval import EngineLM, HarnessRequest, run_harness

TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} ="
doc_to_choice: [" 1", " 22", " 333"]
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def both(model_dir: Path):
    model, tokenizer = load_model(ModelSection(path=str(model_dir)))
    theirs, _ = load_model(
        ModelSection(path=str(model_dir), attn_implementation="eager", experts_implementation="eager")
    )
    return EngineLM(model, tokenizer), HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, device="cpu")


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_the_three_kinds_of_requests_are_answered_as_by_the_harness_itself(both) -> None:
    ours, theirs = both
    pairs = [("1 + 1 =", " 2"), ("1 + 1 =", " 3"), ("小明", "有三袋苹果"), ("", "one two"), ("so ", "it is")]
    for a, b in zip(*(lm.loglikelihood(instances("loglikelihood", *pairs)) for lm in both), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1] == b[1]
    texts = [("one two three " * 2000,), ("a",)]
    found = [lm.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)) for lm in both]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    stop = ours.generate_until(instances("generate_until", ("one", {"until": [], "max_gen_toks": 24})))[0][4:6]
    asks = [("one", {"until": [stop], "max_gen_toks": 24}), ("两个 two", {"until": [], "max_gen_toks": 24})]
    assert ours.generate_until(instances("generate_until", *asks)) == theirs.generate_until(
        instances("generate_until", *asks)
    )


def test_its_tasks_come_out_in_the_suites_form_and_are_not_asked_twice(both, tmp_path: Path, monkeypatch) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}", "answer": n % 3}) + "\n" for n in range(6)))
    (tmp_path / "tiny_sums.yaml").write_text(TASK.format(path=data))
    ours, _ = both
    request = HarnessRequest(("tiny_sums",), tmp_path)
    found = run_harness(ours.model, ours.tokenizer, request, "abc", tmp_path / "evals")["lm-eval:tiny_sums"]
    assert (found["metric"], found["num_items"]) == ("acc", 6)
    assert found["metrics"]["acc"]["low"] <= found["metrics"]["acc"]["value"] <= found["metrics"]["acc"]["high"]
    monkeypatch.setattr(EngineLM, "_loglikelihood_tokens", None)
    again = run_harness(ours.model, ours.tokenizer, request, "abc", tmp_path / "evals")["lm-eval:tiny_sums"]
    assert again["metrics"] == found["metrics"]
    with pytest.raises(ValueError, match="lm-eval has no task 'tiny_sums_2'"):
        run_harness(ours.model, ours.tokenizer, HarnessRequest(("tiny_sums_2",)), "abc", tmp_path)
