"""scripts/bench_experts.py runs and reports what it says it reports."""

import torch


def test_quick_bench_reports_its_keys(quick_bench) -> None:
    found = quick_bench("bench_experts")
    for key, sizes in (
        ("ratio_vs_best", {"64", "256"}),
        ("ratio_vs_best_skewed", {"256"}),
        ("ratio_vs_best_autocast", {"64", "256"}),
        ("ratio_vs_best_tiny", {"512", "1024"}),
    ):
        assert set(found[key]) == sizes
        assert all(ratio > 0 for ratio in found[key].values())
    assert found["ratio_vs_eager_2048"] is None  # 2048 tokens are not among those of a quick run
    assert (found["tflops"] is None) == (found["share_of_peak"] is None) == (not torch.cuda.is_available())
