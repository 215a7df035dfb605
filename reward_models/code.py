"""Rewards for programs: the tests of HumanEval and MBPP, run in the sandbox. Range: 0 or 1."""

from __future__ import annotations

import ast
import builtins
import functools
import json
import re
import sys
from typing import Any

from dots_align.types import Response, reward_range
from reward_models.sandbox.run import Verdict, run_tests

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


@reward_range(0, 1)
def humaneval(response: Response) -> float:
    """1 if the function passes `check`.

    The reference answer is a JSON object of `prompt` (the stub, with imports and helpers), `entry_point` and `test`
    (`data.answer_field: [prompt, entry_point, test]`). The response is the whole function, in a code block or bare, or
    what follows the stub.
    """
    return float(humaneval_verdict(response).passed)


@reward_range(0, 1)
def mbpp(response: Response) -> float:
    """1 if all assertions hold.

    The reference answer is a JSON object of `test_list`, a list of assertions, and optionally `test_setup_code`
    (`data.answer_field: [test_list, test_setup_code]`); or the list alone.
    """
    return float(mbpp_verdict(response).passed)


def humaneval_verdict(response: Response) -> Verdict:
    """As `humaneval`, with the reason. Raises: ValueError, if the reference answer is not of its form."""
    task = _task(response, "prompt", "entry_point", "test")
    stub, name = task["prompt"], task["entry_point"]
    code = program_in(response.text, [name])
    if code is None:
        return Verdict(False, "no code block was closed")
    program = f"{stub}\n{code}" if _defines(code, name) else stub + code
    return run_tests(program, [f"check({name})"], [name], setup=f"{stub}\n{task['test']}")


def mbpp_verdict(response: Response) -> Verdict:
    """As `mbpp`, with the reason. Raises: ValueError, if the reference answer is not of its form."""
    task = _task(response, "test_list")
    tests, setup = task["test_list"], task.get("test_setup_code") or ""
    names, modules = names_under_test("\n".join([setup, *tests]))
    code = program_in(response.text, names)
    if code is None:
        return Verdict(False, "no code block was closed")
    return run_tests(code, tests, list(names), setup="".join(f"import {m}\n" for m in modules) + setup)


def program_in(text: str, names: list[str] | tuple[str, ...]) -> str | None:
    """The code of a response: the last block that defines one of the names, or the last block, or, if there is none,
    the whole text; None if a block was begun and never closed.
    """
    blocks = _BLOCK.findall(text)
    if blocks:
        return next((b for b in reversed(blocks) if any(_defines(b, name) for name in names)), blocks[-1])
    return None if "```" in text else text


def _defines(code: str, name: str) -> bool:
    return bool(
        re.search(rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE)
    )


@functools.lru_cache(maxsize=4096)
def names_under_test(tests: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What tests take from elsewhere: names of the program, and modules of the standard library.

    A built-in name is the program's own only if there is nothing else to be tested (MBPP has a task whose function is
    called `sum`); else a program could replace the `set` in `set(f(1)) == {1}`.

    Raises:
        ValueError: the tests are no valid Python, or use nothing.
    """
    try:
        tree = ast.parse(tests)
    except SyntaxError as error:
        raise ValueError(f"the tests of this prompt are no valid Python: {error}") from None
    nodes = list(ast.walk(tree))
    used = dict.fromkeys(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)} | {
        n.arg for n in nodes if isinstance(n, ast.arg)
    }
    own |= {
        a.asname or a.name.partition(".")[0]
        for n in nodes
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    free = [name for name in used if name not in own]
    modules = tuple(name for name in free if name in sys.stdlib_module_names)
    names = tuple(name for name in free if name not in modules and not hasattr(builtins, name))
    if not names:
        names = tuple(name for name in free if hasattr(builtins, name))
    if not names:
        raise ValueError("the tests of this prompt call nothing, so no program can be right or wrong")
    return names, modules


def _task(response: Response, *fields: str) -> dict[str, Any]:
    where = response.prompt.source or "a prompt"
    try:
        given = json.loads(response.prompt.answer or "")
    except json.JSONDecodeError:
        given = None
    task = {"test_list": given} if isinstance(given, list) else given if isinstance(given, dict) else {}
    if missing := [field for field in fields if not task.get(field)]:
        raise ValueError(
            f"{where}: the reference answer has no {', '.join(missing)}; set data.answer_field to a list of the fields "
            "that hold the tests"
        )
    return task
