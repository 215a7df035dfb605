"""scripts/bench_rollout.py runs and reports what it says it reports."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path


def test_quick_bench_reports_its_keys(repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "scripts" / "bench_rollout.py"), "--quick"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    name, _, text = done.stdout.splitlines()[-1].partition(" ")
    found = json.loads(text)
    assert name == "RESULT"
    assert found["quick"] is True
    assert found["ratio_vs_generate"] > 0
    assert found["ratio_vs_continuous_batching"] > 0
    assert (found["ratio_vs_llama_cpp"] is None) == (importlib.util.find_spec("llama_cpp") is None)
    assert 0 < found["max_logprob_diff"] < 1e-4
    assert found["num_tokens"] > 100
    assert found["kv_ratio"] <= 0.2 < found["kv_ratio_unlimited"] < 0.26
