"""Reward functions by name, in processes of their own, with failures that cost a run nothing."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ends

from dots_align.config import GateSection, RewardSection
from dots_align.scoring import RewardSum, load_function
from dots_align.scoring.pool import CLOSED, Job, ScoringPool
from dots_align.types import Message, Prompt, Response

FUNCTIONS = """
import asyncio, ctypes, os, random, re, time
from dots_align.types import reward_range

def one(response): return 1
def length(response): return len(response.text) / 10
def fails(response): raise KeyError("missing")
def nan(response): return float("nan")
def infinite(response): return float("inf")
def nothing(response): return None
def truth(response): return response.text == "yes"
constant = 3

@reward_range(-1, 0)
def too_high(response): return 0.5
@reward_range(0, 1)
def on_the_edge(response): return 1

def hangs_on_b(response):
    while response.text == "b": pass
    return 1
def catches_everything(response):
    while response.text == "b":
        try: time.sleep(10)
        except BaseException: pass
    return 1
def slow_pattern(response):
    if response.text == "b": re.match("(a+)+$", "a" * 64 + "b")
    return 1
def crashes_on_b(response):
    if response.text == "b": ctypes.string_at(0)
    return 1
def exits_on_b(response):
    if response.text == "b": os._exit(0)
    return 1
def sleeps(response):
    time.sleep(float(response.text))
    return float(response.text)
def stays(response):
    open(response.text, "w").close()
    time.sleep(300)
def drawn(response): return random.random()
def process(response): return os.getpid()
def forks(response):
    child = os.fork()
    if not child: time.sleep(300)
    return child

running = 0
async def how_many_at_once(response):
    global running
    running += 1
    await asyncio.sleep(0.05)
    running -= 1
    return running + 1
async def waits_on_b(response):
    if response.text == "b": await asyncio.sleep(100)
    return 1
async def blocks_on_b(response):
    while response.text == "b": pass
    return 1
async def fails_async(response): raise KeyError("missing")
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return str(path)


@pytest.fixture
def rewards(mine: str) -> Iterator[Callable[..., RewardSum]]:
    """Makes a RewardSum of functions of the file, each by name and weight or as a section; closed after the test."""
    made = []

    def make(*sections: tuple[str, float] | RewardSection, num_workers: int = 2) -> RewardSum:
        given = [
            s if isinstance(s, RewardSection) else RewardSection(function=f"{mine}:{s[0]}", weight=s[1])
            for s in sections
        ]
        made.append(RewardSum(given, num_workers))
        return made[-1]

    yield make
    for one in made:
        one.close()


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
        ("reward_models.math:boxd_answer", "has no function 'boxd_answer'; did you mean boxed_answer?"),
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


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f(response:\n", "SyntaxError: '(' was never closed (broken.py, line 1)"),
        ("\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' (broken.py, line 2)"),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: Expecting property name"),
    ],
)
def test_a_file_that_cannot_be_loaded_tells_where_it_fails(tmp_path: Path, source: str, told: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_function(f"{path}:f", "rewards.function")
    assert str(caught.value).startswith(f"rewards.function: {path} cannot be loaded: {told}")
    assert "\n" not in str(caught.value)


def test_a_function_that_takes_no_response_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.py"
    path.write_text("def nothing(): return 1\ndef two(response, unit): return 1\n")
    with pytest.raises(ValueError, match="too many positional arguments; it is given a response, and takes nothing"):
        RewardSum([RewardSection(function=f"{path}:nothing")])
    with pytest.raises(ValueError, match=r"'unit'; it is given a response, and takes response, unit"):
        RewardSum([RewardSection(function=f"{path}:two")])


def test_a_reward_sum_complains_before_anything_is_scored() -> None:
    with pytest.raises(ValueError, match=r"^rewards\.function: "):
        RewardSum([RewardSection(function="reward_models.none:f")])


def test_the_sum_is_weighted_and_the_parts_are_not(rewards) -> None:
    made = rewards(("one", 0.5), ("length", -2.0), ("truth", 10.0))
    total, parts = made(response("yes"))
    assert total == pytest.approx(0.5 - 0.6 + 10)
    assert parts == {"one": 1.0, "length": pytest.approx(0.3), "truth": 1.0}
    assert made.num_errors == 0


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("fails", "KeyError"),
        ("nan", "nan"),
        ("infinite", "inf"),
        ("nothing", "TypeError"),
        ("too_high", "outside the range -1 to 0"),
        ("fails_async", "KeyError"),
    ],
)
def test_failures_count_as_zero_are_logged_once_and_counted(
    rewards, caplog: pytest.LogCaptureFixture, function: str, kind: str
) -> None:
    made = rewards((function, 5.0), ("one", 1.0))
    with caplog.at_level(logging.ERROR, "dots_align"):
        results = made.score([response()] * 3)
    assert results == [(1.0, {function: 0.0, "one": 1.0})] * 3
    assert made.num_errors == 3
    (record,) = caplog.records
    assert kind in caplog.text
    assert "data.jsonl:4" in record.getMessage()
    assert "Traceback" in record.getMessage()  # in full: the user has to find the line


def test_the_line_that_failed_is_told(rewards, mine: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "dots_align"):
        rewards(("fails", 1.0))(response())
    line = next(n for n, text in enumerate(FUNCTIONS.splitlines(), start=1) if "def fails(" in text)
    assert f'"{mine}", line {line}' in caplog.text


def test_every_failing_function_is_logged(rewards, caplog: pytest.LogCaptureFixture) -> None:
    made = rewards(("fails", 1.0), ("nan", 1.0))
    with caplog.at_level(logging.ERROR, "dots_align"):
        made(response())
    assert len(caplog.records) == made.num_errors == 2


def test_a_value_may_lie_on_the_edge_of_its_range(rewards) -> None:
    assert rewards(("on_the_edge", 1.0))(response()) == (1.0, {"on_the_edge": 1.0})


# -------------------------------------------------------------------------------------------------- time and processes


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("hangs_on_b", "took longer than 1 s"),
        ("catches_everything", "took longer than 1 s"),
        ("slow_pattern", "took longer than 1 s"),
        ("waits_on_b", "took longer than 1 s"),
        ("crashes_on_b", "ended its process (exit status -11)"),
        ("exits_on_b", "ended its process (exit status 0)"),
    ],
)
def test_a_grader_that_hangs_or_dies_costs_only_its_own_response(
    rewards, mine: str, caplog: pytest.LogCaptureFixture, function: str, told: str
) -> None:
    made = rewards(RewardSection(function=f"{mine}:{function}", timeout_seconds=1.0), ("one", 10.0))
    with caplog.at_level(logging.ERROR, "dots_align"):
        totals = [total for total, _ in made.score([response(text) for text in "aabaaaabaa"])]
    assert totals == [11, 11, 10, 11, 11, 11, 11, 10, 11, 11]
    assert made.num_errors == 2
    assert told in caplog.text
    assert made.score([response("a")])[0][0] == 11


def test_an_async_function_that_blocks_cannot_hang_the_step(rewards, mine: str, monkeypatch) -> None:
    monkeypatch.setattr("dots_align.scoring.pool.GRACE_SECONDS", 0.1)
    made = rewards(RewardSection(function=f"{mine}:blocks_on_b", timeout_seconds=0.3), ("one", 10.0))
    totals = [total for total, _ in made.score([response(text) for text in "ab"])]
    assert totals == [10, 10]  # of those it had at the same time, nobody knows which one it was
    assert made.num_errors == 2


def test_async_functions_run_as_many_at_once_as_told(rewards, mine: str) -> None:
    section = RewardSection(function=f"{mine}:how_many_at_once", max_concurrency=3)
    values = [total for total, _ in rewards(section).score([response(str(i)) for i in range(9)])]
    assert max(values) == 3


@pytest.mark.parametrize("keys", [{}, {"run_in": "trainer"}])
def test_responses_that_come_one_by_one_score_as_all_together(rewards, mine: str, keys: dict) -> None:
    sections = [RewardSection(function=f"{mine}:{name}", **keys) for name in ("length", "how_many_at_once")]
    made, texts = rewards(*sections, num_workers=2), ["", "a", "abc", "ab", "abcd", "abcde"]
    scoring = made.begin()
    for text in texts:
        scoring.add([response(text)])
    assert [values["length"] for _, values in scoring.results()] == [len(text) / 10 for text in texts]
    assert (made.busy_seconds > 0) is not bool(keys)


def test_closing_ends_what_is_still_in_line(rewards, mine: str) -> None:
    made = rewards(RewardSection(function=f"{mine}:how_many_at_once"), ("sleeps", 1.0), num_workers=1)
    scoring = made.begin()
    for _ in range(3):
        scoring.add([response("20")])
    made.close()
    assert [values["sleeps"] for _, values in scoring.results()] == [0.0] * 3
    scoring.add([response("20")])  # and what comes after it
    assert [total for total, _ in scoring.results()][3:] == [0.0]


def test_results_come_in_the_order_of_the_responses(rewards) -> None:
    texts = [f"0.{n:02}" for n in random.Random(0).sample(range(10), 10)]
    found = rewards(("sleeps", 1.0), ("length", 0.0), num_workers=3).score([response(text) for text in texts])
    assert [total for total, _ in found] == [float(text) for text in texts]


def test_numbers_drawn_at_random_depend_on_the_response_alone(rewards) -> None:
    batch = [response(text) for text in "abcdefgh"]
    first = rewards(("drawn", 1.0), num_workers=1).score(batch)
    assert rewards(("drawn", 1.0), num_workers=3).score(batch[::-1])[::-1] == first
    assert len({total for total, _ in first}) == 8


def test_functions_run_in_processes_or_where_they_are_told(rewards, mine: str) -> None:
    by_name = f"{mine}:process"
    made = rewards(
        RewardSection(function=by_name, name="beside"), RewardSection(function=by_name, name="here", run_in="trainer")
    )
    found = [values for _, values in made.score([response()] * 8)]
    assert {values["here"] for values in found} == {os.getpid()}
    assert os.getpid() not in {values["beside"] for values in found}


def test_closing_ends_the_processes_even_at_work(rewards, mine: str) -> None:
    made = rewards(("process", 1.0), ("sleeps", 0.0))
    pids = {int(total) for total, _ in made.score([response("0")] * 16)}
    with ThreadPoolExecutor(1) as thread:
        scored = thread.submit(made.score, [response("50")] * 4)
        time.sleep(0.2)
        made.close()
        scored.result()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_closed_pool_has_let_go_of_all_its_jobs(mine: str, caplog) -> None:
    pool = ScoringPool([(f"{mine}:sleeps", {})], 2)
    done = pool.submit(Job(0, [response("0")], 60, 0))
    assert done.result() == [0.0]
    jobs = [pool.submit(Job(0, [response("50")], 60, 0)) for _ in range(4)]
    pool.close()
    assert [job.done() and job.result() for job in jobs] == [[CLOSED]] * 4
    assert pool.submit(Job(0, [response("50")], 60, 0)).result() == [CLOSED]
    pool.close()


def test_what_a_reward_function_has_started_does_not_keep_a_pool_from_closing(mine: str) -> None:
    pool = ScoringPool([(f"{mine}:forks", {})], 1)
    (child,) = pool.submit(Job(0, [response()], 60, 0)).result()
    pool.close()
    assert isinstance(child, float)
    assert ends(int(child))


def test_a_process_that_dies_while_its_pool_closes_is_left_alone(tmp_path: Path, mine: str, monkeypatch) -> None:
    """Its number may be another's as soon as somebody has asked for its exit status."""
    there = []

    def kill(group: int, number: int) -> None:
        os.kill(group, number)
        waited_until = time.monotonic() + 0.3
        while (alive := Path(f"/proc/{group}").exists()) and time.monotonic() < waited_until:
            time.sleep(0.01)
        there.append(alive)

    pool = ScoringPool([(f"{mine}:stays", {})], 1)
    pool.submit(Job(0, [response(str(tmp_path / "mark"))], 60, 0))
    while not (tmp_path / "mark").exists():
        time.sleep(0.01)
    monkeypatch.setattr("dots_align.scoring.pool.os.killpg", kill)
    pool.close()
    assert there == [True]


@pytest.mark.parametrize("function", ["one", "waits_on_b"])
@pytest.mark.parametrize(("python", "told"), [("/nowhere", "No such file"), ("/bin/false", "exit status 1")])
def test_a_machine_that_starts_no_more_processes_costs_rewards_and_not_the_run(
    rewards, monkeypatch, caplog, function: str, python: str, told: str
) -> None:
    start = subprocess.Popen

    def started(*arguments, **options) -> subprocess.Popen:
        process = start(*arguments, **options)
        process.wait()  # it is gone before anybody talks to it
        return process

    made = rewards((function, 1.0))
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as thread, caplog.at_level(logging.ERROR, "dots_align"):
        patch.setattr("dots_align.scoring.pool.sys.executable", python)
        patch.setattr("dots_align.scoring.pool.subprocess.Popen", started)
        assert thread.submit(made.score, [response()] * 3).result(300) == [(0.0, {function: 0.0})] * 3
    assert told in caplog.text
    assert made.score([response()]) == [(1.0, {function: 1.0})]


def test_a_module_that_only_the_trainer_can_import_fails_once_for_all(tmp_path: Path, rewards, caplog) -> None:
    path = tmp_path / "choosy.py"
    path.write_text("import sys\nif 'pytest' not in sys.modules: raise KeyError('no')\ndef f(response): return 1")
    with caplog.at_level(logging.ERROR, "dots_align"):
        assert (
            rewards(RewardSection(function=f"{path}:f"), num_workers=1).score([response()] * 4)
            == [(0.0, {"f": 0.0})] * 4
        )
    assert "could not load it (exit status 1)" in caplog.text


def test_no_responses_are_no_work(rewards) -> None:
    assert rewards(("one", 1.0)).score([]) == []


# -------------------------------------------------------------------------------------------------------- names, gates


def test_functions_of_the_same_name_in_two_files_both_count(tmp_path: Path, rewards) -> None:
    names = []
    for name, value in (("first", 1), ("second", 10)):
        (tmp_path / f"{name}.py").write_text(f"def score(response): return {value}")
        names.append(f"{tmp_path / name}.py:score")
    total, parts = rewards(*(RewardSection(function=name) for name in names))(response())
    assert total == 11
    assert sorted(parts.values()) == [1, 10]


def test_a_reward_file_may_use_dataclasses(tmp_path: Path, rewards) -> None:
    """They look their module up in sys.modules."""
    path = tmp_path / "with_dataclass.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\ndef f(response): return Score(2.0).value\n"
    )
    assert rewards(RewardSection(function=f"{path}:f"))(response())[0] == 2.0


def test_a_gate_lets_a_reward_count_only_where_another_is_high_enough(rewards, mine: str) -> None:
    gated = RewardSection(
        function=f"{mine}:length", weight=10, name="short", gate=GateSection(reward="truth", at_least=1)
    )
    found = rewards(("truth", 1.0), gated).score([response("yes"), response("no")])
    assert found == [(4.0, {"truth": 1.0, "short": 0.3}), (0.0, {"truth": 0.0, "short": 0.2})]


def test_a_gate_behind_a_failed_reward_is_closed(rewards, mine: str) -> None:
    """Though the failure counts as 0, and the gate asks for no more than that."""
    gated = RewardSection(function=f"{mine}:one", gate=GateSection(reward="fails", at_least=0))
    assert rewards(("fails", 1.0), gated)(response()) == (0.0, {"fails": 0.0, "one": 1.0})
