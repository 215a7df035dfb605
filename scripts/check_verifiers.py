"""Do the verifiers know right from wrong? Real benchmarks: every reference answer has to score 1, corrupted ones 0.

Reads the benchmarks of `--data` ($DOTS_ALIGN_DATA, or shared/data beside the checkout); one that is not there is left
out. Prints each exception, a table, then one line `RESULT {json}` with, for each benchmark, `references` and
`references_right` (how many score 1), `corrupted` (how many wrong answers were tried) and `corrupted_wrong` (how many
score 0).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dots_align.types import Message, Prompt, Response
from reward_models.code import humaneval, mbpp, names_under_test
from reward_models.math import boxed_answer, final_answer, number, numeric_answer

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """An answer whose score is known. `kind` is `reference`, or what was done to it."""

    where: str
    kind: str
    text: str
    answer: str

    def score(self, verifier: Callable[[Response], float]) -> float:
        return verifier(Response(Prompt([Message("user", "")], self.answer, self.where), self.text))


def _lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


# ---------------------------------------------------------------------------------------------------------------- code

# The reference program inside another one, which makes wrong what its functions return, but of the same kind.
WRAPPED = """
_right = {{}}
exec({source!r}, _right)
def _wrong(x):
    if isinstance(x, bool): return not x
    if isinstance(x, (int, float, complex)): return x + 1
    if isinstance(x, str): return x + "?"
    if isinstance(x, tuple): return x + (0,)
    if isinstance(x, list): return x + [0]
    if isinstance(x, (set, frozenset)): return x ^ {{"?"}}
    if isinstance(x, dict): return {{**x, "?": 0}}
    return "?" if x is None else None
def _wrap(f):
    def wrapper(*args, **kwargs):
        value = f(*args, **kwargs)
        return {returns}
    return f if isinstance(f, type) else wrapper
{assignments}
"""
CORRUPTIONS = {"returns None": "None", "returns something else of its kind": "_wrong(value)"}


def _corrupted_programs(source: str, names: list[str]) -> Iterator[tuple[str, str]]:
    assignments = "\n".join(f"{name} = _wrap(_right[{name!r}])" for name in names)
    for kind, returns in CORRUPTIONS.items():
        yield kind, WRAPPED.format(source=source, returns=returns, assignments=assignments)


def humaneval_cases(data: Path) -> Iterator[Case]:
    for task in _lines(data / "humaneval" / "HumanEval.jsonl.gz"):
        answer = json.dumps({key: task[key] for key in ("prompt", "entry_point", "test")})
        yield Case(task["task_id"], "reference", task["canonical_solution"], answer)
        for kind, program in _corrupted_programs(task["prompt"] + task["canonical_solution"], [task["entry_point"]]):
            yield Case(task["task_id"], kind, program, answer)


def mbpp_cases(data: Path) -> Iterator[Case]:
    for task in _lines(data / "mbpp" / "mbpp.jsonl"):
        where, tests = f"MBPP/{task['task_id']}", task["test_list"] + task["challenge_test_list"]
        answer = json.dumps({"test_list": tests, "test_setup_code": task["test_setup_code"]})
        yield Case(where, "reference", f"```python\n{task['code']}\n```", answer)
        names, _ = names_under_test("\n".join([task["test_setup_code"], *tests]))
        for kind, program in _corrupted_programs(task["code"], list(names)):
            yield Case(where, kind, f"```python\n{program}\n```", answer)


# --------------------------------------------------------------------------------------------------------------- maths


def gsm8k_cases(data: Path) -> Iterator[Case]:
    for split in ("train", "test"):
        for index, row in enumerate(_lines(data / "gsm8k" / f"{split}.jsonl"), start=1):
            where, answer = f"gsm8k/{split}:{index}", row["answer"]
            steps, _, end = answer.rpartition("#### ")
            value = int(end.replace(",", ""))
            yield Case(where, "reference", answer, answer)
            yield Case(where, "reference, boxed", rf"{steps}So it is \boxed{{{end}}}.", answer)
            for kind, wrong in (("one more", value + 1), ("times ten", 10 * value or 10), ("negative", -value or -1)):
                yield Case(where, kind, f"{steps}#### {wrong}", answer)


def cmath_cases(data: Path) -> Iterator[Case]:
    for index, row in enumerate(_lines(data / "cmath" / "test.jsonl"), start=1):
        where, answer = f"cmath:{index}", str(row["answer"])
        found = number(answer)
        assert found is not None, where
        yield Case(where, "reference", f"所以答案是{answer}。", answer)
        yield Case(where, "reference, boxed", rf"所以答案是\boxed{{{answer}}}。", answer)
        yield Case(where, "one more", f"所以答案是{found.value + 1}。", answer)
        yield Case(where, "upside down", f"所以答案是{1 / found.value if found.value not in (0, 1) else 2}。", answer)


def math500_cases(data: Path) -> Iterator[Case]:
    """`reference` is the gold answer in a box, `rewritten` the same formula in other characters."""
    rows = _lines(data / "math500" / "test.jsonl")
    golds = [final_answer(row["answer"]) for row in rows]
    for index, (row, gold) in enumerate(zip(rows, golds, strict=True)):
        where = f"math500:{index + 1}"
        yield Case(where, "reference", rf"So it is \boxed{{{gold}}}.", row["answer"])
        rewritten = re.sub(r"\\d?frac", lambda _: r"\dfrac", gold.replace(r"\left", "").replace(r"\right", ""))
        yield Case(where, "reference, rewritten", rf"So it is \boxed{{ {rewritten} }}.", row["answer"])
        yield Case(where, "plus one", rf"So it is \boxed{{{gold} + 1}}.", row["answer"])
        other = next(
            g
            for g in golds[index:] + golds
            if g not in gold and gold not in g and (not number(g) or number(g) != number(gold))
        )
        yield Case(where, "another problem's answer", rf"So it is \boxed{{{other}}}.", row["answer"])


BENCHMARKS: dict[str, tuple[Callable[[Path], Iterator[Case]], Callable[[Response], float]]] = {
    "humaneval": (humaneval_cases, humaneval),
    "mbpp": (mbpp_cases, mbpp),
    "gsm8k": (gsm8k_cases, numeric_answer),
    "cmath": (cmath_cases, numeric_answer),
    "math500": (math500_cases, boxed_answer),
}


def _score(job: tuple[str, Case]) -> float:
    name, case = job
    return case.score(BENCHMARKS[name][1])


def check(name: str, data: Path, every: int, pool: ProcessPoolExecutor) -> dict[str, int]:
    """Counts of one benchmark; prints every case that was not scored as it should have been."""
    cases = list(BENCHMARKS[name][0](data))
    wanted = set(list(dict.fromkeys(case.where for case in cases))[::every])
    cases = [case for case in cases if case.where in wanted]
    counts = {"references": 0, "references_right": 0, "corrupted": 0, "corrupted_wrong": 0}
    for case, score in zip(cases, pool.map(_score, [(name, case) for case in cases], chunksize=16), strict=True):
        is_reference = case.kind.startswith("reference")
        counts["references" if is_reference else "corrupted"] += 1
        if score == float(is_reference):
            counts["references_right" if is_reference else "corrupted_wrong"] += 1
        else:
            print(f"exception: {case.where}: {case.kind}: scored {score:g}: {case.answer[-80:]!r}", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("DOTS_ALIGN_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default, help=f"folder of benchmarks (default {default})")
    parser.add_argument("--every", type=int, default=1, help="only every n-th problem (default 1: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("benchmarks", nargs="*", metavar="benchmark", help=f"of {', '.join(BENCHMARKS)} (default all)")
    options = parser.parse_args()
    results = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for name in options.benchmarks or BENCHMARKS:
            if (options.data / name).is_dir():
                results[name] = check(name, options.data, options.every, pool)
    print(f"\n{'':<10} {'references':>10} {'score 1':>8} {'corrupted':>10} {'score 0':>8}")
    for name, row in results.items():
        print(f"{name:<10} " + " ".join(f"{v:>{w}}" for v, w in zip(row.values(), (10, 8, 10, 8), strict=True)))
    print(f"RESULT {json.dumps(results)}")


if __name__ == "__main__":
    main()
