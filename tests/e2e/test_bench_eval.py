"""`scripts/bench_eval.py --quick`: both answer the same, and the line that others read."""

from collections.abc import Callable
from typing import Any

import pytest


def test_quick_bench_answers_the_same_both_ways(quick_bench: Callable[[str], dict[str, Any]]):
    pytest.importorskip("lm_eval")
    found = quick_bench("bench_eval")
    assert found["same_answers"] > 0.9  # fresh weights tie often
    assert found["eval_ratio"] > 0
    assert found["eval_ratio_zero_shot"] > 0
    assert set(found["runs"]) == {"5", "0"}
