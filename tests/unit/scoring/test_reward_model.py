"""Reward functions that score many responses at once with a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dots_align.config import RewardSection
from dots_align.scoring import RewardSum
from dots_align.types import Message, Prompt, Response

FUNCTIONS = """
from dots_align.types import reward_range, uses_reward_model

calls = []

@uses_reward_model
def times(responses, model, factor=1.0):
    calls.append(len(responses))
    return [factor * score for score in model(responses)]

@uses_reward_model
def one_too_few(responses, model): return model(responses)[1:]

@uses_reward_model
def fails(responses, model): raise RuntimeError("out of memory")

@reward_range(0, 2)
@uses_reward_model
def within(responses, model): return model(responses)

def one(response): return 1
"""
PROMPT = Prompt([Message("user", "q")], "a", "data.jsonl:4")
RESPONSES = [Response(PROMPT, text) for text in ("a", "bb", "ccc")]


def load(path: str):
    """A reward model that likes long answers."""
    assert path == "runs/rm"

    def model(responses: Sequence[Response]) -> list[float]:
        return [float(len(r.text)) for r in responses]

    return model


def section(folder: Path, name: str, **given: object) -> RewardSection:
    file = folder / "by_model.py"
    file.write_text(FUNCTIONS)
    values = {"run_in": "trainer", "arguments": {"checkpoint": "runs/rm"}, **given}
    return RewardSection.model_validate({"function": f"{file}:{name}", **values})


def test_all_responses_are_scored_in_one_call_beside_other_functions(tmp_path: Path) -> None:
    by_model = section(tmp_path, "times", weight=2.0, arguments={"checkpoint": "runs/rm", "factor": 0.5})
    other = section(tmp_path, "one", run_in="worker", arguments={})
    with RewardSum([by_model, other], 1, load) as rewards:
        found = rewards.score(RESPONSES)
        assert [total for total, _ in found] == [2.0, 3.0, 4.0]
        assert [values["times"] for _, values in found] == [0.5, 1.0, 1.5]
        assert rewards.num_errors == 0


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("fails", [0, 0, 0], "out of memory"),
        ("one_too_few", [0, 0, 0], "returned 2 values for 3 responses"),
        ("within", [0, 0, 0], "outside the range 0 to 2"),
    ],
)
def test_what_fails_counts_as_nothing_and_is_told(tmp_path: Path, caplog, name, values, message) -> None:
    with RewardSum([section(tmp_path, name)], 1, load) as rewards, caplog.at_level("ERROR", logger="dots_align"):
        assert [total for total, _ in rewards.score(RESPONSES)] == values
        assert rewards.num_errors == 3
    assert message in caplog.text


def test_what_cannot_be_served_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    for given, loader in (({"run_in": "worker"}, load), ({}, None)):
        with pytest.raises(ValueError, match=r"times uses a reward model.*give it `run_in: trainer`"):
            RewardSum([section(tmp_path, "times", **given)], 1, loader)
    with pytest.raises(ValueError, match="`checkpoint` is missing, the path of its reward model"):
        RewardSum([section(tmp_path, "times", arguments={})], 1, load)
    wrong = {"checkpoint": "runs/rm", "faktor": 2}
    with pytest.raises(ValueError, match="unexpected keyword argument 'faktor'"):
        RewardSum([section(tmp_path, "times", arguments=wrong)], 1, load)
