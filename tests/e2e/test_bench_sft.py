"""scripts/bench_sft.py runs, and what it compares is the same training."""

import json
import subprocess
import sys
from pathlib import Path


def test_quick_bench_compares_equal_losses(repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "scripts" / "bench_sft.py"), "--quick"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    name, _, text = done.stdout.splitlines()[-1].partition(" ")
    found = json.loads(text)
    assert name == "RESULT"
    assert found["quick"] is True
    assert found["max_loss_diff"] < 1e-3
    ratios = ("sft_ratio", "dpo_ratio", "sft_ratio_vs_best", "dpo_ratio_vs_best")
    assert all(found[key] > 0 for key in ratios)
    assert found["peak_ratio"] > 1.5
