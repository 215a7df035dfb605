"""scripts/bench_grpo.py runs both sides, and its phases are those of whole steps."""


def test_quick_bench_splits_whole_steps(quick_bench) -> None:
    found = quick_bench("bench_grpo")
    (row,) = found["rows"].values()
    assert found["step_ratio"] == row["step_ratio"] > 0
    assert set(found["split"]) == {"rollout", "score", "logprob", "update", "other"}
    for side in (0, 1):
        # Ours may have every score by the time the last sample is there.
        assert all(found["split"][phase][side] > 0 for phase in ("rollout", "logprob", "update"))
        assert len(row["rewards"][side]) == 3
    # The same weights, prompts and reward: before anything was learned both sides get about as much.
    ours, theirs = (curve[0] for curve in row["rewards"])
    assert abs(ours - theirs) < 0.15
