"""Evaluation of a model: what it writes down, the same every time, and nothing else changed by it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import Dots1ForCausalLM, PreTrainedTokenizerFast

from dots_align.config import (
    DataSection,
    EvalRecipe,
    EvaluationSection,
    HookSection,
    ModelSection,
    PairEvaluationSection,
    RewardModelRecipe,
)
from dots_align.evals.command import result_file, run_recipe
from dots_align.evals.on_save import evaluate_checkpoint, evaluation_key, resolve_hooks
from dots_align.evals.suite import evaluate
from dots_align.types import Response


def evaluation(**keys) -> EvaluationSection:
    return EvaluationSection(
        **{"data": DataSection(path="synthetic:heldout", seed=1), "num_prompts": 6, "max_tokens": 5, **keys}
    )


def even_questions_are_right(response: Response) -> float:
    """1 for an even number of letters in the question, else 0.5; fails where the reference answer is odd."""
    if int(response.prompt.answer or "0") % 2:
        raise RuntimeError("odd")
    return 1.0 if len(response.prompt.messages[-1].content) % 2 == 0 else 0.5


def test_the_result_has_the_documented_keys(model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    result = evaluate(model, tokenizer, evaluation(num_samples_shown=4), 0)
    assert {"metrics", "num_prompts", "data", "scorer", "samples"} <= result.keys()
    assert set(result["metrics"]) == {"exact_match", "stop_rate", "mean_length"}
    assert result["num_prompts"] == 6
    assert result["data"] == "synthetic:heldout"
    assert result["scorer"] == "reward_models.math:boxed_answer"
    assert len(result["samples"]) == 4
    assert all(set(s) == {"prompt", "response", "answer", "score", "finish_reason"} for s in result["samples"])
    assert result["metrics"] == {"exact_match": 0.0, "stop_rate": 0.0, "mean_length": 5.0}
    assert json.loads(json.dumps(result)) == result


def test_it_is_deterministic_and_leaves_the_global_rngs_alone(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.get_rng_state(), random.getstate()
    first = evaluate(model, tokenizer, evaluation(), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(99)
    assert evaluate(model, tokenizer, evaluation(), 0) == first
    assert evaluate(model, tokenizer, evaluation(data=DataSection(path="synthetic:heldout", seed=2)), 0) != first


def test_a_model_that_ends_its_turn_at_once(model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its layers add nothing to embeddings of ones, of which the head makes the stop token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1)
        model.lm_head.weight.zero_()[tokenizer.eos_token_id] = 1
    result = evaluate(model, tokenizer, evaluation(), 0)
    assert result["metrics"] == {"exact_match": 0.0, "stop_rate": 1.0, "mean_length": 1.0}
    assert [(s["response"], s["finish_reason"]) for s in result["samples"]] == [("", "stop")] * 6


def test_exact_match_is_the_share_scored_one_and_failures_count_as_wrong(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": "ab", "answer": "2"}, {"prompt": "abc", "answer": "2"}, {"prompt": "ab", "answer": "3"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(path=str(tmp_path / "data.jsonl"))
    result = evaluate(model, tokenizer, evaluation(data=data, scorer=f"{__file__}:even_questions_are_right"), 0)
    assert result["num_prompts"] == 3
    assert result["metrics"]["exact_match"] == pytest.approx(1 / 3)
    assert result["num_scorer_errors"] == 1
    assert [s["score"] for s in result["samples"]] == [1.0, 0.5, 0.0]
    assert [s["prompt"] for s in result["samples"]] == ["ab", "abc", "ab"]


def test_a_prompt_that_leaves_no_room_names_its_record(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"^synthetic:heldout:0: prompt of \d+ tokens plus max_tokens=250 is longer"):
        evaluate(model, tokenizer, evaluation(max_tokens=250), 0)


def recipe(tmp_path: Path, **keys):
    from dots_align.config import SftRecipe

    data = DataSection(path="synthetic:sft")
    return SftRecipe(stage="sft", output_dir=str(tmp_path), data=data, evaluation=evaluation(), **keys)


def test_the_hook_writes_what_the_evaluation_found(model_dir: Path, tmp_path: Path) -> None:
    import shutil

    checkpoint = Path(shutil.copytree(model_dir, tmp_path / "checkpoint-1"))
    (hook,) = resolve_hooks(recipe(tmp_path, on_save=(HookSection(hook="evaluate"),)))
    assert (hook.name, hook.function, hook.everywhere) == ("evaluate", evaluate_checkpoint, True)
    metrics = hook.function(checkpoint, recipe(tmp_path))
    assert metrics == {"eval/exact_match": 0.0, "eval/stop_rate": 0.0, "eval/mean_length": 5.0}
    written = json.loads((checkpoint / "eval.json").read_text())
    assert {f"eval/{k}": v for k, v in written["metrics"].items()} == metrics
    assert written["key"] == evaluation_key(ModelSection(), evaluation(), 0)


def test_another_evaluation_leaves_the_checkpoints_own_alone(tmp_path: Path) -> None:
    def asked(**keys) -> EvalRecipe:
        return EvalRecipe(stage="eval", model=ModelSection(path=str(tmp_path)), evaluation=evaluation(**keys))

    own = tmp_path / "eval.json"
    assert result_file(tmp_path, asked()) == own
    own.write_text(json.dumps({"key": evaluation_key(ModelSection(), evaluation(num_samples_shown=2), 0)}))
    assert result_file(tmp_path, asked()) == own
    others = [result_file(tmp_path, asked(**keys)) for keys in ({"max_tokens": 6}, {"scorer": "a:b"})]
    assert len({own, *others}) == 3
    assert {(path.parent.is_dir(), path.parent) for path in others} == {(True, tmp_path / "evals")}
    own.write_text('{"metrics": {}}')  # of a version that wrote no key
    assert result_file(tmp_path, asked()) != own
    elsewhere = asked().model_copy(update={"output": str(tmp_path / "a" / "b.json")})
    assert result_file(tmp_path, elsewhere) == tmp_path / "a" / "b.json"
    assert (tmp_path / "a").is_dir()
    nowhere = asked().model_copy(update={"output": str(own / "b.json")})
    with pytest.raises(ValueError, match=r"eval\.json: results cannot be written there; give output=FILE"):
        result_file(tmp_path, nowhere)


def test_a_hook_that_leads_nowhere_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^on_save: cannot import 'nowhere'"):
        resolve_hooks(recipe(tmp_path, on_save=(HookSection(hook="evaluate"), HookSection(hook="nowhere:hook"))))
    broken = recipe(tmp_path).model_copy(update={"evaluation": evaluation(scorer="reward_models.math:none")})
    with pytest.raises(ValueError, match=r"^evaluation\.scorer: reward_models\.math has no function 'none'"):
        resolve_hooks(broken)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"path": "nowhere.jsonl"}, r"^evaluation\.data\.path=nowhere\.jsonl: no such file"),
        (
            {"path": "a.jsonl"},
            r"^a\.jsonl:1: no field 'answer' .*; set evaluation\.data\.answer_field to",
        ),
    ],
)
def test_data_that_cannot_be_asked_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, str], told: str
) -> None:
    """Not after it, at the first save; and by the keys that are to be changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1?", "solution": "2"}\n')
    with pytest.raises(ValueError, match=told):
        resolve_hooks(recipe(tmp_path).model_copy(update={"evaluation": evaluation(data=DataSection(**data))}))
    eval_recipe = EvalRecipe(stage="eval", model=ModelSection(path="none"), evaluation=evaluation(data=data))
    with pytest.raises(ValueError, match=told):
        run_recipe(eval_recipe)


def test_pairs_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    pairs = PairEvaluationSection(data=DataSection(path="nowhere.jsonl"))
    keys = {"output_dir": str(tmp_path), "data": DataSection(path="synthetic:preference"), "evaluation": pairs}
    with pytest.raises(ValueError, match=r"^evaluation\.data\.path=nowhere\.jsonl: no such file"):
        resolve_hooks(RewardModelRecipe(stage="reward_model", **keys))
