"""The suite on a real tiny model: likelihoods against a plain forward, answers cut off, runs that go on, results."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dots1ForCausalLM, PreTrainedTokenizerFast

from dots_align.evals import benchmarks
from dots_align.evals.answers import Ask, answers
from dots_align.evals.benchmarks import Suite, run_suite, table
from dots_align.evals.likelihood import likelihoods
from dots_align.evals.scorers import choice_letter, contains_answer, exact_words, f1_words, share_contained
from dots_align.evals.statistics import mean_interval, pass_at_k, powers_of_two
from dots_align.rollout.engine import RolloutEngine
from dots_align.types import GenerationRequest, Message, Prompt, Response, SamplingParams


def test_likelihoods_are_those_of_a_plain_forward(model: Dots1ForCausalLM) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 500, (9, 40), generator=generator).tolist()
    questions = [
        (ids[0][:7], [[30], [31], [32]]),
        (ids[1], [ids[2][:5], ids[2][:3], [*ids[2][:4], 77], ids[3][:9]]),
        (ids[4][:1], [ids[5]]),
    ]
    with torch.no_grad():
        best = int(model(torch.tensor([ids[0][:7]])).logits[0, -1].argmax())
    questions[0][1].append([best])
    for room in (16, 8192):
        found = dict(likelihoods(model, questions, room))
        assert sorted(found) == [0, 1, 2]
        for place, (context, continuations) in enumerate(questions):
            for likelihood, tokens in zip(found[place], continuations, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].double()
                wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()
                assert likelihood.logprob == pytest.approx(float(wanted), abs=1e-4)
                assert likelihood.num_tokens == len(tokens)
                assert likelihood.greedy == logits.argmax(-1).eq(torch.tensor(tokens)).all()
    assert found[0][3].greedy


def test_answers_end_before_a_stop_text(model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine, prompt = RolloutEngine(model), tokenizer("one two")["input_ids"]
    sampling = SamplingParams(temperature=1.0, max_tokens=80, seed=3)
    ((_, whole),) = answers(engine, tokenizer, [Ask(prompt, sampling, 2)])
    texts = [answer.text for answer in whole]
    stop = texts[0][-3:]
    asks = [Ask(prompt, sampling, 2, (stop, "\u2603")), Ask(prompt, sampling, 2), Ask([], sampling)]
    found = dict(answers(engine, tokenizer, asks))
    assert [answer.text for answer in found[0]] == [text.split(stop)[0] for text in texts]
    assert found[0][0].finish_reason == "stop"
    assert found[1] == whole
    assert "the prompt is empty" in found[2]


def test_a_text_ends_an_answer_soon_and_nothing_is_read_twice(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, prompt = RolloutEngine(model), tokenizer("one two")["input_ids"]
    sampling = SamplingParams(temperature=1.0, max_tokens=80, seed=3)
    ((_, (whole,)),) = answers(engine, tokenizer, [Ask(prompt, sampling)])
    assert whole.num_tokens == 80
    early = len(tokenizer.decode(engine.generate([GenerationRequest(prompt, 1, sampling)])[0][0].response_ids[:20]))
    engine = RolloutEngine(model)
    asks = [Ask(prompt, sampling, 1, (whole.text[early : early + 9],)), Ask(prompt, sampling, 1, ("\u2603",))]
    found = dict(answers(engine, tokenizer, asks))
    assert found[0][0].text == whole.text[: whole.text.find(asks[0].stop[0])]
    assert found[0][0].num_tokens <= 48
    assert found[1][0] == whole
    assert engine.stats.num_sampled_tokens == found[0][0].num_tokens + 80
    assert engine.stats.num_prompt_tokens == 2 * len(prompt)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = {
        "gsm8k/test.jsonl": [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(4)],
        "c3/dev.jsonl": [{"context": "a", "question": "b", "choice": ["x", "yy", "z"], "answer": "yy"}] * 3,
        "lambada/test.jsonl": [{"text": "one two three"}],
        "chinese_simpleqa/x.jsonl": [{"question": "q", "answer": "a", "primary_category": c} for c in "甲乙"],
    }
    for name, records in rows.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in records))
    return tmp_path


def test_a_suite_asks_scores_and_sums_up_and_does_not_ask_twice(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("gsm8k", "c3", "lambada", "chinese_simpleqa")
    suite = Suite(names, data, changes=(("max_tokens", 6), ("num_samples", 2), ("temperature", 1.0)))
    found = run_suite(model, tokenizer, suite, "abc", data / "evals")
    assert list(found) == list(names)
    assert set(found["gsm8k"]["metrics"]) == {
        *("accuracy", "stop_rate", "mean_length", "accuracy_pass@1", "accuracy_pass@2")
    }
    assert found["gsm8k"]["metrics"]["mean_length"]["value"] <= 6
    assert found["c3"]["metrics"]["accuracy"]["value"] in (0.0, 1.0)
    assert found["lambada"]["metrics"]["perplexity"]["value"] > 1
    assert found["chinese_simpleqa"]["metric"] == "contains"  # no judge was given
    assert found["chinese_simpleqa"]["groups"].keys() == {"甲", "乙"}
    (lines,) = (data / "evals").glob("gsm8k-*.items.jsonl")
    first = json.loads(lines.read_text().splitlines()[0])
    assert first["source"].endswith("gsm8k/test.jsonl:1")
    assert len(first["answers"]) == len(first["scores"]["accuracy"]) == 2
    assert "gsm8k" in table(found).splitlines()[1]
    monkeypatch.setattr(benchmarks, "answers", None)
    monkeypatch.setattr(benchmarks, "likelihoods", None)
    again = run_suite(model, tokenizer, suite, "abc", data / "evals")
    assert all(task.pop("cached") for task in again.values())
    assert again == found
    with pytest.raises(TypeError):  # other weights are asked
        run_suite(model, tokenizer, suite, "abd", data / "evals")


def test_of_two_that_want_the_same_one_asks(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(*arguments: Any):
        begun.set()
        assert may_end.wait(300)
        yield from likelihoods(*arguments)

    monkeypatch.setattr(benchmarks, "likelihoods", slow)
    arguments = model, tokenizer, Suite(("c3",), data), "abc", data / "evals"
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run_suite, *arguments)
        assert begun.wait(300)
        second = threads.submit(run_suite, *arguments)
        time.sleep(0.1)
        may_end.set()
    assert second.result() == {"c3": {**first.result()["c3"], "cached": True}}


def test_no_answer_is_lost_where_a_process_dies_while_it_collects_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = benchmarks._Lines(tmp_path / "task-key", 3)
    lines.own.write_bytes('{"index": 0}\n{"index": 1}\n{"index": 2, "text": "你'.encode()[:-1])
    (tmp_path / ".task-key.part-1.jsonl").write_text('{"index": 2}\n')

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            lines.collect()
    assert lines.collect() == {0, 1, 2}
    assert lines.paths() == [lines.own]
    assert lines.own.read_text() == '{"index": 0}\n{"index": 1}\n{"index": 2}\n'


def test_a_run_that_was_cut_off_goes_on_to_the_same_result(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite(("gsm8k",), data, changes=(("max_tokens", 6), ("temperature", 1.0)))
    whole = run_suite(model, tokenizer, suite, "abc", data / "whole")["gsm8k"]
    asked = []

    def cut(engine: Any, tokenizer: Any, asks: list[Ask]):
        for number, found in enumerate(answers(engine, tokenizer, asks)):
            asked.append(len(asks))
            if number == 2 and len(asks) == 4:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(benchmarks, "answers", cut)
    with pytest.raises(KeyboardInterrupt):
        run_suite(model, tokenizer, suite, "abc", data / "cut")
    (part,) = (data / "cut").glob(".gsm8k-*.part-0.jsonl")
    part.write_text(part.read_text() + '{"index": 3, "ans')  # as a killed process leaves it
    found = run_suite(model, tokenizer, suite, "abc", data / "cut")["gsm8k"]
    assert asked == [4, 4, 4, 2, 2]
    assert {k: v for k, v in found.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    assert not list((data / "cut").glob(".gsm8k-*"))


def test_an_item_that_does_not_fit_counts_as_wrong_and_is_counted(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    (data / "c3" / "dev.jsonl").write_text(
        json.dumps({"context": "a " * 9000, "question": "b", "choice": ["x", "y"], "answer": "y"}) + "\n"
    )
    found = run_suite(model, tokenizer, Suite(("c3",), data), "abc", data / "evals")["c3"]
    assert (found["num_errors"], found["metrics"]["accuracy_by_length"]["value"]) == (1, 0.0)


def test_statistics_against_known_values() -> None:
    assert mean_interval([0.0] * 10) == pytest.approx((0, 0, 0.2775328), abs=1e-6)  # Wilson, as R's binom package
    assert mean_interval([1.0] * 3 + [0.0]) == pytest.approx((0.75, 0.3006418, 0.9544127), abs=1e-6)
    assert mean_interval([0.5, 0.7, 0.9]) == pytest.approx((0.7, 0.7 - 0.2263, 0.7 + 0.2263), abs=1e-4)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("scorer", "text", "answer", "expected"),
    [
        (choice_letter, "So it is prime. The answer is (C).", "C", 1),
        (choice_letter, "The answer is (C). No: the answer is (D)", "C", 0),
        (choice_letter, r"\boxed{B}", "B", 1),
        (choice_letter, "经过推理，答案是：Ｂ。", "B", 1),
        (choice_letter, "A cat sat there, and I left before the answer was given to anybody.", "A", 0),
        (choice_letter, "B", "B", 1),
        (contains_answer, "It was in 1969, I think.", "1969", 1),
        (contains_answer, "足阳明 胃经", "足阳明胃经", 0),
        (share_contained, "1234567 and 5", '["1234567", "7654321"]', 0.5),
        (exact_words, "Counting.\nAnswer: The 2 goals.", '["2 goals"]', 1),
        (f1_words, "Answer: two touchdown passes", '["touchdown passes", "7"]', 0.8),
        (f1_words, "Answer: 3 goals", '["2 goals"]', 0),
        (f1_words, "", '["2 goals"]', 0),
    ],
)
def test_scorers(scorer: Any, text: str, answer: str, expected: float) -> None:
    assert scorer(Response(Prompt([Message("user", "q")], answer), text)) == pytest.approx(expected)
