"""Reward functions by name, summed, with failures that cost a run nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dots_align.scoring import RewardSum, load_function
from dots_align.types import Message, Prompt, Response

FUNCTIONS = """
def one(response): return 1
def length(response): return len(response.text) / 10
def fails(response): raise KeyError("missing")
def nan(response): return float("nan")
def infinite(response): return float("inf")
def nothing(response): return None
def truth(response): return response.text == "yes"
constant = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return str(path)


def response(text: str = "yes") -> Response:
    return Response(Prompt([Message("user", "q")], "a", "data.jsonl:4"), text)


def test_functions_are_found_in_modules_and_files(mine: str) -> None:
    from reward_models.math import boxed_answer

    assert load_function("reward_models.math:boxed_answer", "k") is boxed_answer
    assert load_function(f"{mine}:length", "k")(response("12345")) == 0.5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("boxed_answer", "must be `module:function` or `path/to/file.py:function`"),
        ("reward_models.maths:boxed_answer", "cannot import 'reward_models.maths'"),
        ("reward_models.math:boxed", "reward_models.math has no function 'boxed'"),
        ("no/such/file.py:f", "no such file no/such/file.py"),
        ("{mine}:constant", "has no function 'constant'"),
        ("{mine}:", "has no function ''"),
    ],
)
def test_a_name_that_leads_nowhere_names_the_key(mine: str, name: str, told: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - looked at below
        load_function(name.format(mine=mine), "evaluation.scorer")
    assert str(caught.value).startswith("evaluation.scorer: ")
    assert told in str(caught.value)


def test_a_reward_sum_complains_before_anything_is_scored() -> None:
    with pytest.raises(ValueError, match=r"^rewards\.function: "):
        RewardSum([("reward_models.math:boxed_answer", 1.0), ("reward_models.none:f", 1.0)])


def test_the_sum_is_weighted_and_the_parts_are_not(mine: str) -> None:
    rewards = RewardSum([(f"{mine}:one", 0.5), (f"{mine}:length", -2.0), (f"{mine}:truth", 10.0)])
    total, parts = rewards(response("yes"))
    assert total == pytest.approx(0.5 - 0.6 + 10)
    assert parts == {"one": 1.0, "length": pytest.approx(0.3), "truth": 1.0}
    assert rewards.num_errors == 0


@pytest.mark.parametrize(
    ("function", "kind"), [("fails", "KeyError"), ("nan", "nan"), ("infinite", "inf"), ("nothing", "TypeError")]
)
def test_failures_count_as_zero_are_logged_once_and_counted(
    mine: str, caplog: pytest.LogCaptureFixture, function: str, kind: str
) -> None:
    rewards = RewardSum([(f"{mine}:{function}", 5.0), (f"{mine}:one", 1.0)])
    with caplog.at_level(logging.ERROR, "dots_align"):
        results = [rewards(response()) for _ in range(3)]
    assert results == [(1.0, {function: 0.0, "one": 1.0})] * 3
    assert rewards.num_errors == 3
    (record,) = caplog.records
    assert kind in caplog.text
    assert "data.jsonl:4" in record.getMessage()
    assert record.exc_info  # in full: the user has to find the line


def test_every_failing_function_is_logged(mine: str, caplog: pytest.LogCaptureFixture) -> None:
    rewards = RewardSum([(f"{mine}:fails", 1.0), (f"{mine}:nan", 1.0)])
    with caplog.at_level(logging.ERROR, "dots_align"):
        rewards(response())
    assert len(caplog.records) == rewards.num_errors == 2


def test_functions_of_the_same_name_in_two_files_both_count(tmp_path: Path) -> None:
    names = []
    for name, value in (("first", 1), ("second", 10)):
        (tmp_path / f"{name}.py").write_text(f"def score(response): return {value}")
        names.append(f"{tmp_path / name}.py:score")
    total, parts = RewardSum([(names[0], 1.0), (names[1], 1.0)])(response())
    assert total == 11
    assert sorted(parts.values()) == [1, 10]


def test_a_reward_file_may_use_dataclasses(tmp_path: Path) -> None:
    """They look their module up in sys.modules."""
    path = tmp_path / "with_dataclass.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\ndef f(response): return Score(2.0).value\n"
    )
    assert RewardSum([(f"{path}:f", 1.0)])(response())[0] == 2.0
