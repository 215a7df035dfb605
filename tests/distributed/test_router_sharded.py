"""The balance loss and the bias policy of a sharded model against one process."""

import pytest
from process_group import launch
from router_cases import balance_equals_one_process


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parallel", [{"ep": 1}, {"ep": 2}], ids=str)
def test_balance_and_bias_equal_one_process(parallel, checkpointing):
    for rank in launch(2, balance_equals_one_process, parallel, checkpointing):
        assert rank["moved"] > 0.1
        assert rank["weights"] < 1e-5
        assert rank["same_bias"]
        assert rank["same_load"]
        assert rank["balance"] < 1e-5
        assert rank["pressure"] < 1e-9
