"""Seeded bilingual (zh/en) arithmetic: questions in words, worked answers that end in `\\boxed{…}`.

The train and held-out splits share no pair of operands: a pair (a, b) belongs to the held-out split by a fixed hash,
whatever the operation, the wording or the seed. Memorising the training answers therefore does not help on the
held-out ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from dots_align.data.chat import DEFAULT_SYSTEM
from dots_align.types import Conversation, Message, PreferencePair, Prompt

KINDS = ("sft", "preference", "heldout_preference", "prompts", "heldout")
HELDOUT_SHARE = 0.15
MIN_OPERAND, MAX_OPERAND = 10, 49  # two digits each, so that the written method always has the same steps
SLIP_RATE = 0.7  # share of the carries and borrows that the writers of the SFT answers forget

# A template is (operation, text); {a} {b} are the operands. The operation decides how the answer is worked out.
TEMPLATES: tuple[tuple[str, str], ...] = (
    ("+", "What is {a} plus {b}?"),
    ("+", "Add {a} and {b}."),
    ("+", "Tom has {a} apples and buys {b} more. How many apples does he have now?"),
    ("+", "A shelf holds {a} red books and {b} blue books. How many books are there?"),
    ("+", "{a}加{b}等于多少？"),
    ("+", "小明有{a}个苹果，又买了{b}个，现在有几个？"),
    ("+", "书架上有{a}本红书和{b}本蓝书，一共有几本？"),
    ("-", "What is {a} minus {b}?"),
    ("-", "Subtract {b} from {a}."),
    ("-", "Anna has {a} coins and spends {b} of them. How many coins are left?"),
    ("-", "There are {a} birds on a tree and {b} fly away. How many birds stay?"),
    ("-", "{a}减{b}等于多少？"),
    ("-", "小红有{a}元，花了{b}元，还剩几元？"),
    ("-", "树上有{a}只鸟，飞走了{b}只，还有几只？"),
)


@dataclass(frozen=True)
class Problem:
    """One arithmetic question; `a >= b` where the operation is a subtraction, so answers are never negative."""

    question: str
    operation: str
    a: int
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.operation == "+" else self.a - self.b

    @property
    def regroups(self) -> bool:
        """Whether the ones digits carry (addition) or borrow (subtraction)."""
        a, b = self.a % 10, self.b % 10
        return a + b >= 10 if self.operation == "+" else a < b

    def solution(self, slip: bool = False) -> str:
        """The method, digit by digit: `27+45: 7+5=12, 2+4=6, 6+1=7. \\boxed{72}`, `52-27: 12-7=5, 5-2=3, 3-1=2. …`.

        With `slip` the carry or borrow is forgotten, and with it the right result.
        """
        (a10, a1), (b10, b1) = divmod(self.a, 10), divmod(self.b, 10)
        sign = 1 if self.operation == "+" else -1
        borrowed = 10 * int(self.regroups and sign < 0)
        ones, tens = a1 + borrowed + sign * b1, a10 + sign * b10
        steps = f"{a1 + borrowed}{self.operation}{b1}={ones}, {a10}{self.operation}{b10}={tens}"
        if self.regroups and not slip:
            steps += f", {tens}{self.operation}1={tens + sign}"
            tens += sign
        return f"{self.a}{self.operation}{self.b}: {steps}. \\boxed{{{10 * tens + ones % 10}}}"


def is_heldout(a: int, b: int) -> bool:
    """Whether the unordered operand pair belongs to the held-out split: a property of the pair alone."""
    low, high = sorted((a, b))
    digest = hashlib.blake2b(f"{low},{high}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELDOUT_SHARE


def problems(seed: int, heldout: bool) -> Iterator[Problem]:
    """An endless, seeded stream of problems from one side of the split."""
    rng = random.Random(f"problems-{seed}-{heldout}")
    while True:
        a, b = rng.randint(MIN_OPERAND, MAX_OPERAND), rng.randint(MIN_OPERAND, MAX_OPERAND)
        operation, text = rng.choice(TEMPLATES)
        if operation == "-" and a < b:
            a, b = b, a
        if is_heldout(a, b) == heldout:
            yield Problem(text.format(a=a, b=b), operation, a, b)


def _take(count: int, seed: int, heldout: bool) -> Iterator[Problem]:
    for _, problem in zip(range(count), problems(seed, heldout), strict=False):
        yield problem


def sft_conversations(count: int, seed: int) -> list[Conversation]:
    """Worked answers to training problems, by writers who forget most carries and borrows (`SLIP_RATE`).

    Imitation therefore learns the method and the slip; what is right is learned from preferences and from the verifier.
    """
    rng = random.Random(f"slips-{seed}")
    return [
        Conversation(
            [Message("user", p.question), Message("assistant", p.solution(slip=rng.random() < SLIP_RATE))],
            f"synthetic:sft:{i}",
        )
        for i, p in enumerate(_take(count, seed, heldout=False))
    ]


def preference_pairs(count: int, seed: int, heldout: bool = False) -> list[PreferencePair]:
    """Correct and concise against a forgotten carry or borrow; where there is none, against a near miss, unboxed,
    wordy.
    """
    kind = "heldout_preference" if heldout else "preference"
    rng = random.Random(f"pairs-{seed}")
    return [
        PreferencePair([Message("user", p.question)], p.solution(), _rejected(p, rng), f"synthetic:{kind}:{i}")
        for i, p in enumerate(_take(count, seed, heldout))
    ]


def _rejected(problem: Problem, rng: random.Random) -> str:
    if problem.regroups:
        return problem.solution(slip=True)
    right = problem.solution()
    kind = rng.random()
    if kind < 1 / 3:
        near = rng.choice([n for d in (-10, -1, 1, 10) if (n := problem.answer + d) >= 0])
        return right.replace(f"{{{problem.answer}}}", f"{{{near}}}")
    if kind < 2 / 3:
        return right.replace(f"\\boxed{{{problem.answer}}}", str(problem.answer))
    return right.replace(". ", f". {problem.a} {problem.operation} {problem.b}, {problem.answer}. ")


def prompts(count: int, seed: int, heldout: bool = False) -> list[Prompt]:
    """Problems with their answers, for RL (`heldout=False`) or evaluation (`heldout=True`)."""
    kind = "heldout" if heldout else "prompts"
    return [
        Prompt([Message("user", p.question)], str(p.answer), f"synthetic:{kind}:{i}")
        for i, p in enumerate(_take(count, seed, heldout))
    ]


def corpus(count: int = 4000, seed: int = 0) -> Iterator[str]:
    """Text for training the tokenizer: questions and worked answers of the training split."""
    for problem in _take(count, seed, heldout=False):
        yield f"{DEFAULT_SYSTEM}\n{problem.question}\n{problem.solution()}"
