"""Sharded training steps against one process, in fp32."""

import pytest
from process_group import launch
from sharding_cases import Step, steps_equal_one_process

STEPS = [
    Step(),
    Step(max_norm=0.1, accumulation=2),
    Step(checkpointing=True),
    Step(skew=True),
    Step(uneven=True),
]
LAYOUTS = [
    (world, {"ep": ep, "dp_replicate": replicas})
    for world in (2, 4, 8)
    for replicas in (1, 2)
    for ep in (1, 2, 4, 8)
    if world % (ep * replicas) == 0
]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=lambda v: str(v))
def test_steps_equal_one_process(world, parallel):
    differences, *_ = launch(world, steps_equal_one_process, parallel, STEPS)
    for step, difference in zip(STEPS, differences, strict=True):
        assert max(difference.values()) < 1e-5, (step, difference)
