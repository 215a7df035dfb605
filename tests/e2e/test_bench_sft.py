"""scripts/bench_sft.py runs, and what it compares is the same training."""


def test_quick_bench_compares_equal_losses(quick_bench) -> None:
    found = quick_bench("bench_sft")
    assert found["max_loss_diff"] < 1e-3
    ratios = ("sft_ratio", "dpo_ratio", "sft_ratio_vs_best", "dpo_ratio_vs_best")
    assert all(found[key] > 0 for key in ratios)
    assert found["peak_ratio"] > 1.5
