"""scripts/bench_rollout.py runs and reports what it says it reports."""

import importlib.util


def test_quick_bench_reports_its_keys(quick_bench) -> None:
    found = quick_bench("bench_rollout")
    assert found["ratio_vs_generate"] > 0
    assert found["ratio_vs_continuous_batching"] > 0
    assert (found["ratio_vs_llama_cpp"] is None) == (importlib.util.find_spec("llama_cpp") is None)
    assert 0 < found["max_logprob_diff"] < 1e-4
    assert found["num_tokens"] > 100
    assert found["kv_ratio"] <= 0.2 < found["kv_ratio_unlimited"] < 0.26
