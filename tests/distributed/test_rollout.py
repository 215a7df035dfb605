"""A sharded model rolls out, in lockstep, what one process would."""

from __future__ import annotations

import pytest
from process_group import launch
from rollout_cases import Case, all_requests, rolls_out_as_one_process

CASES = {
    2: [
        Case({"ep": 1}),
        Case({"ep": 2}),
        Case({"ep": 2}, blocks=12, num_rows=20, chunk_tokens=11),
        Case({"ep": 2}, skew=True),
    ],
    4: [Case({"ep": 4}), Case({"ep": 2}, blocks=3, chunk_tokens=16), Case({"ep": 2, "dp_replicate": 2})],
    8: [Case({"ep": 4}), Case({"ep": 8}, blocks=1, num_rows=5)],
}


@pytest.mark.parametrize("world", CASES)
def test_sharded_rollouts_equal_one_process(world: int) -> None:
    ranks = launch(world, rolls_out_as_one_process, CASES[world])
    wanted = sum(r.num_samples for r in all_requests())
    for number, case in enumerate(CASES[world]):
        of_case = [rank[number] for rank in ranks]
        assert sum(found["samples"] for found in of_case) == wanted
        assert of_case[-1]["samples"] == 0  # it only answered for its experts
        assert sum(found["compared"] for found in of_case) > 150
        assert max(found["largest"] for found in of_case) < 1e-4
        assert sum(found["flipped"] for found in of_case) < 100
        if case.blocks is not None:
            assert sum(found["preempted"] for found in of_case) > 0
