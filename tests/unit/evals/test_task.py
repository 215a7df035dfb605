"""Tasks: what they ask, letter by letter, and what they say of records that do not fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dots_align.evals.needle import records as needles
from dots_align.evals.task import example_prompts, load_items, load_task, task_names

TECH_REPORT = {
    *(
        "gsm8k",
        "math",
        "math500",
        "cmath",
        "aime",
        "humaneval",
        "mbpp",
        "mmlu",
        "mmlu_pro",
        "ceval",
        "cmmlu",
        "cluewsc",
    ),
    *("c3", "xiezhi", "arc_easy", "arc_challenge", "simpleqa", "chinese_simpleqa", "ifeval", "lambada"),
    *("ruler_needle", "drop"),
}


def test_the_prompt_of_every_task_is_frozen(repo_root: Path) -> None:
    assert set(task_names()) == TECH_REPORT
    golden = json.loads((repo_root / "tests" / "golden" / "eval_prompts.json").read_text(encoding="utf-8"))
    assert example_prompts() == golden, "prompts changed; if that is meant, run scripts/update_goldens.py and say why"


def write(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def items(name: str, folder: Path, **keys: Any):
    return load_items(load_task(name), folder, None, keys.get("limit"), hub=False)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "q"}, r"gsm8k/test\.jsonl:2: no field 'answer', which task gsm8k needs \(the record has"),
        (
            {"question": "q", "answer": 4},
            r"gsm8k/test\.jsonl:2: field 'answer' must be a text for task gsm8k",
        ),
        (["q"], r"gsm8k/test\.jsonl:2: expected a JSON object, found list"),
    ],
)
def test_a_record_that_does_not_fit_is_named_by_file_and_line(tmp_path: Path, row: Any, complaint: str) -> None:
    write(tmp_path, "gsm8k/test.jsonl", {"question": "q", "answer": "#### 1"}, row)
    with pytest.raises(ValueError, match=complaint):
        items("gsm8k", tmp_path)


def test_a_right_choice_that_is_none_of_them_is_named(tmp_path: Path) -> None:
    record = {"context": ["a"], "question": "q", "choice": ["x", "y"], "answer": "z"}
    write(tmp_path, "c3/dev.jsonl", record)
    with pytest.raises(ValueError, match=r"c3/dev\.jsonl:1: not a record of task c3: 'z' is not in list"):
        items("c3", tmp_path)


def test_csv_without_a_header_gives_columns_groups_and_lines(tmp_path: Path) -> None:
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "dev").mkdir()
    (tmp_path / "mmlu" / "dev" / "us_law_dev.csv").write_text('"1, or\n2?",a,b,c,d,C\n3?,a,b,c,d,A\n')
    (tmp_path / "mmlu" / "test" / "us_law_test.csv").write_text('"x\ny?",a,b,c,d,B\nz?,a,b,c,d,D\n')
    first, second = items("mmlu", tmp_path)
    assert (first.group, first.gold, second.gold) == ("us law", 1, 3)
    assert [item.source.rpartition("/")[2] for item in (first, second)] == ["us_law_test.csv:1", "us_law_test.csv:3"]
    assert first.prompt.startswith(
        "The following are multiple choice questions (with answers) about us law.\n\n1, or\n2?"
    )
    assert first.prompt.count("Answer: C\n\n") == 1
    (tmp_path / "mmlu" / "test" / "us_law_test.csv").write_text("z?,a,b,c,d\n")
    with pytest.raises(ValueError, match=r"us_law_test\.csv:1: 5 columns, expected 6 \(question, A, B, C, D, answer\)"):
        items("mmlu", tmp_path)


def test_other_copies_names_compressed_files_and_limits(tmp_path: Path) -> None:
    write(tmp_path, "cmath/test.jsonl", *({"question": f"q{n}", "golden": str(n), "grade": 3} for n in range(5)))
    found = items("cmath", tmp_path, limit=2)
    assert [(item.reference, item.group) for item in found] == [("0", "3"), ("1", "3")]
    (tmp_path / "humaneval").mkdir()
    row = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass"}
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (item,) = items("humaneval", tmp_path)
    assert json.loads(item.reference) == row


def test_no_data_says_where_it_was_looked_for_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task gsm8k: none of gsm8k/test\.jsonl, .* under .*, nor was --hub given"):
        items("gsm8k", tmp_path)


def test_unknown_tasks_and_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no task 'gsm9k'; there are aime, arc_challenge, "):
        load_task("gsm9k")
    own = tmp_path / "own.yaml"
    text = (Path(load_task.__globals__["TASKS"]) / "gsm8k.yaml").read_text().replace("metric:", "metrik:")
    own.write_text(text)
    with pytest.raises(ValueError, match=r"own\.yaml:\d+: unknown key `metrik`; did you mean `metric`\?"):
        load_task(str(own))


def test_needles_take_the_length_they_are_asked_for(tokenizer) -> None:
    for record in needles(tokenizer, lengths=[400, 900], num_needles=2, num_records=2, answer_tokens=32):
        assert all(f"is: {answer}." in record["text"] for answer in record["answers"])
        size = len(tokenizer(record["text"] + record["question"])["input_ids"])
        assert record["length"] - 32 - 64 - 60 <= size <= record["length"] - 32
    with pytest.raises(ValueError, match="a haystack of 90 tokens has no room"):
        list(needles(tokenizer, lengths=[90]))
