"""scripts/bench_mismatch.py runs: the gate stops a run whose rollouts come from other weights, the rest go on."""

from pathlib import Path


def test_quick_bench_stops_at_the_gate(quick_bench, start: Path) -> None:
    found = quick_bench("bench_mismatch", "--start", str(start))
    assert found["gate_fired"] is True
    assert set(found["curve"]) == {"right", "plain", "corrected"}
    assert found["kl"]["right"] < 1e-4  # where two experts tie, either engine may choose
    assert found["router_shift"]["right"] < 0.01
    assert found["router_shift"]["plain"] > 0.5
    assert found["kl"]["plain"] > found["kl"]["corrected"]
