"""The synthetic task: the split holds, right answers are right, wrong ones are wrong for the reason given."""

from __future__ import annotations

import re
from itertools import pairwise, product

import pytest

from dots_align.data import synthetic
from dots_align.data.synthetic import MAX_OPERAND, MIN_OPERAND, SLIP_RATE, TEMPLATES, Problem
from dots_align.types import Message, Prompt, Response
from reward_models.math import boxed_answer

BOX = re.compile(r"\\boxed\{(\d+)\}")
EVERY_PROBLEM = [
    Problem("", operation, a, b)
    for operation, a, b in product("+-", range(MIN_OPERAND, MAX_OPERAND + 1), range(MIN_OPERAND, MAX_OPERAND + 1))
    if operation == "+" or a >= b
]


def ask(question: str) -> tuple[str, int, int]:
    """(operation, a, b) read back from the words, by whichever template they match."""
    for operation, text in TEMPLATES:
        pattern = re.escape(text).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
        if found := re.fullmatch(pattern, question):
            return operation, int(found["a"]), int(found["b"])
    raise AssertionError(question)


def result(question: str) -> int:
    operation, a, b = ask(question)
    return a + b if operation == "+" else a - b


def boxed(solution: str) -> int:
    (found,) = BOX.findall(solution)
    return int(found)


def score(question: str, answer: str) -> float:
    prompt = Prompt([Message("user", question)], str(result(question)))
    return boxed_answer(Response(prompt, answer))


def chinese(text: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", text))


def test_the_same_seed_gives_the_same_records_and_another_seed_others() -> None:
    for make in (synthetic.sft_conversations, synthetic.preference_pairs, synthetic.prompts):
        assert make(50, 3) == make(50, 3)
        assert make(50, 3) != make(50, 4)
        assert make(80, 3)[:50] == make(50, 3)
    assert list(synthetic.corpus(20)) == list(synthetic.corpus(20))


def test_training_and_held_out_questions_share_no_pair_of_operands() -> None:
    def pairs(questions: list[str]) -> set[frozenset[int]]:
        return {frozenset(ask(q)[1:]) for q in questions}

    train: set[frozenset[int]] = set()
    heldout: set[frozenset[int]] = set()
    for seed in range(4):
        train |= pairs([c.messages[0].content for c in synthetic.sft_conversations(1500, seed)])
        train |= pairs([p.prompt[0].content for p in synthetic.preference_pairs(1500, seed)])
        heldout |= pairs([p.prompt[0].content for p in synthetic.preference_pairs(300, seed, heldout=True)])
        train |= pairs([p.messages[0].content for p in synthetic.prompts(1500, seed)])
        train |= pairs([text.splitlines()[1] for text in synthetic.corpus(1500, seed)])
        heldout |= pairs([p.messages[0].content for p in synthetic.prompts(1500, seed, heldout=True)])
    assert not train & heldout
    count = MAX_OPERAND - MIN_OPERAND + 1
    everything = count * (count + 1) // 2
    assert len(train | heldout) > 0.95 * everything
    assert len(heldout) / everything == pytest.approx(synthetic.HELDOUT_SHARE, abs=0.04)


def test_reference_answers_are_right_and_never_negative() -> None:
    for prompt in [*synthetic.prompts(1500, 0), *synthetic.prompts(1500, 0, heldout=True)]:
        assert prompt.answer == str(result(prompt.messages[0].content))
        assert int(prompt.answer) >= 0


def test_worked_solutions_are_right_in_every_step() -> None:
    for problem in EVERY_PROBLEM:
        solution = problem.solution()
        assert boxed(solution) == problem.answer
        steps = re.findall(r"(\d+)([+-])(\d+)=(\d+)", solution)
        assert len(steps) == (3 if problem.regroups else 2)
        for a, sign, b, found in steps:
            assert int(found) == (int(a) + int(b) if sign == "+" else int(a) - int(b)), solution


def test_a_slip_is_wrong_exactly_where_something_is_carried_or_borrowed() -> None:
    assert len({p.regroups for p in EVERY_PROBLEM}) == 2
    for problem in EVERY_PROBLEM:
        slipped = problem.solution(slip=True)
        assert (boxed(slipped) != problem.answer) == problem.regroups
        assert (slipped == problem.solution()) == (not problem.regroups)


def test_documented_solution() -> None:
    assert Problem("", "+", 27, 45).solution() == r"27+45: 7+5=12, 2+4=6, 6+1=7. \boxed{72}"
    assert Problem("", "-", 52, 27).solution() == r"52-27: 12-7=5, 5-2=3, 3-1=2. \boxed{25}"


def test_sft_answers_slip_at_the_slip_rate_and_are_right_elsewhere() -> None:
    slips = []
    for conversation in synthetic.sft_conversations(4000, 0):
        question, answer = (m.content for m in conversation.messages)
        operation, a, b = ask(question)
        if Problem(question, operation, a, b).regroups:
            slips.append(score(question, answer) == 0)
        else:
            assert score(question, answer) == 1
    assert len(slips) > 1000
    assert sum(slips) / len(slips) == pytest.approx(SLIP_RATE, abs=0.04)


def test_preferred_answers_are_right_and_rejected_ones_bad_for_a_reason() -> None:
    reasons = {"wrong": 0, "unboxed": 0, "wordy": 0}
    for pair in synthetic.preference_pairs(2000, 0):
        question = pair.prompt[-1].content
        assert score(question, pair.chosen) == 1
        assert pair.rejected != pair.chosen
        if "\\boxed" not in pair.rejected:
            reasons["unboxed"] += 1
            assert pair.rejected.endswith(str(result(question)))
        elif score(question, pair.rejected) == 0:
            reasons["wrong"] += 1
        else:
            reasons["wordy"] += 1
            assert len(pair.rejected) > len(pair.chosen)
    assert min(reasons.values()) > 100
    assert reasons["wrong"] > 1000


def test_both_languages_and_both_operations_are_present() -> None:
    for questions in (
        [c.messages[0].content for c in synthetic.sft_conversations(1000, 0)],
        [p.messages[0].content for p in synthetic.prompts(1000, 0, heldout=True)],
    ):
        assert 0.3 < sum(map(chinese, questions)) / len(questions) < 0.6
        assert 0.3 < sum(ask(q)[0] == "-" for q in questions) / len(questions) < 0.7


def test_sources_number_the_records() -> None:
    for make, kind in ((synthetic.sft_conversations, "sft"), (synthetic.preference_pairs, "preference")):
        numbers = [int(r.source.removeprefix(f"synthetic:{kind}:")) for r in make(5, 0)]
        assert all(after - before == 1 for before, after in pairwise(numbers))
