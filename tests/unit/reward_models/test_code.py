"""Programs against the tests of HumanEval and MBPP."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.code import humaneval, humaneval_verdict, mbpp, mbpp_verdict, names_under_test, program_in

STUB = """from typing import List


def helper(x):
    return x + 1


def add(xs: List[int]) -> int:
    '''Sum of xs.'''
"""
TASK = {
    "prompt": STUB,
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == helper(2)\n    assert candidate([]) == 0\n",
}
ASSERTIONS = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": ""}


def response(text: str, answer: Any) -> Response:
    return Response(Prompt([Message("user", "q")], json.dumps(answer), "tasks.jsonl:7"), text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("    return sum(xs)\n", 1),
        ("def add(xs):\n    return sum(xs)", 1),
        ("Here:\n```python\ndef add(xs: List[int]) -> int:\n    return sum(xs)\n```\nDone.", 1),
        ("```\nadd = sum\n```", 1),
        ("```python\n    return sum(xs)\n```", 1),
        ("First ```python\ndef add(xs): return 0\n``` is wrong.\n```py\ndef add(xs): return sum(xs)\n```", 1),
        ("```python\ndef add(xs): return 0\n```\nBetter:\n```py\ndef add(xs): return sum(xs)\n```", 1),
        ("```python\ndef add(xs): return sum(xs)\n```\nUse it:\n```python\nprint(add([1]))\n```", 1),
        ("```python\ndef add(xs): return helper(sum(xs)) - 1\n```", 1),
        ("    return 3\n", 0),
        ("```python\ndef add(xs): return sum(xs)\n", 0),
        ("", 0),
        ("```python\n```", 0),
        ("The sum is easy.", 0),
        ("```python\ndef helper(x): return 99\ndef add(xs): return 99 if xs else 0\n```", 0),
        ("```python\nimport sys\ndef check(candidate): pass\ndef add(xs): sys.exit(0)\n```", 0),
    ],
)
def test_humaneval(text: str, score: float) -> None:
    assert humaneval(response(text, TASK)) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("```python\ndef add(a, b):\n    return a + b\n```", 1),
        ("def add(a, b): return a + b", 1),
        ("def add(a, b): return 3", 0),
        ("def plus(a, b): return a + b", 0),
        ("def add(a, b):\n    raise AssertionError", 0),
    ],
)
def test_mbpp(text: str, score: float) -> None:
    assert mbpp(response(text, ASSERTIONS)) == mbpp(response(text, ASSERTIONS["test_list"])) == score


def test_reasons_are_told() -> None:
    assert humaneval_verdict(response("```python\nx", TASK)).reason == "no code block was closed"
    assert mbpp_verdict(response("def plus(): pass", ASSERTIONS)).reason.startswith("program: AttributeError")


def test_names_of_the_program_and_of_modules() -> None:
    assert names_under_test("assert f(1) == 2") == (("f",), ())
    assert names_under_test("root = Node(1)\nassert set(height(root)) == {1}") == (("Node", "height"), ())
    assert names_under_test("assert f(1) == sys.getsizeof(1)") == (("f",), ("sys",))
    assert names_under_test("import math as m\nassert m.isclose(f(1), 2)") == (("f",), ())
    assert names_under_test("assert sum(10, 15) == 25") == (("sum",), ())


def test_a_program_cannot_replace_what_the_tests_are_written_with() -> None:
    cheat = "def f(x): return x\ndef set(x): return {1}\ndef sorted(x): return [1]\n__builtins__ = {}"
    assert mbpp(response(cheat, ["assert set(f([2])) == {1}"])) == 0
    assert mbpp(response(cheat, ["assert sorted(f([2])) == [1]"])) == 0
    assert mbpp(response("def sum(a, b): return a * b", ["assert sum(3, 4) == 12"])) == 1


@pytest.mark.parametrize("answer", [None, "", "42", "[]", '{"test_list": []}', '{"tests": ["assert f()"]}'])
def test_an_answer_without_tests_says_where_and_what_to_do(answer: str | None) -> None:
    with pytest.raises(ValueError, match=r"tasks\.jsonl:7: .*test_list; set data\.answer_field"):
        mbpp(Response(Prompt([Message("user", "q")], answer, "tasks.jsonl:7"), "def f(): pass"))


@pytest.mark.parametrize("tests", ["assert f(", "assert True"])
def test_tests_that_test_nothing_are_refused(tests: str) -> None:
    with pytest.raises(ValueError, match="tests of this prompt"):
        mbpp(response("def f(): pass", [tests]))


def test_code_in_a_response() -> None:
    assert program_in("x = 1", ["f"]) == "x = 1"
    assert program_in("```python\na\n```\n```\nb\n```", ["f"]) == "b\n"
    assert program_in("1. Do it:\n   ```python\n   x\n   ```", ["f"]) == "   x\n"


# ---------------------------------------------------------------------------------- real tasks; all: check_verifiers.py


def test_humaneval_references(shared_data: Path) -> None:
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        tasks = [json.loads(line) for line in lines]
    for task in tasks[::16] + [t for t in tasks if t["task_id"] in ("HumanEval/32", "HumanEval/38", "HumanEval/50")]:
        assert humaneval(response(task["canonical_solution"], task)) == 1, task["task_id"]
        assert humaneval(response("    return None\n", task)) == 0, task["task_id"]


def test_mbpp_references(shared_data: Path) -> None:
    """With those that need a class, a module or a built-in name of the program."""
    lines = (shared_data / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = [json.loads(line) for line in lines]
    for task in tasks[::60] + [t for t in tasks if t["task_id"] in (126, 367, 596, 601, 927)]:
        assert mbpp(response(task["code"], task)) == 1, task["task_id"]
        assert mbpp(response(task["code"].replace("return", "return None and"), task)) == 0, task["task_id"]
