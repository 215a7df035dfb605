"""Sharded training steps against one process, in fp32."""

import pytest
import sharding_cases
import torch
from process_group import launch
from sharding_cases import Step, bf16_step, bytes_exchanged, save_and_load, steps_equal_one_process

STEPS = [
    Step(),
    Step(max_norm=0.1, accumulation=2),
    Step(checkpointing=True),
    Step(skew=True),
    Step(uneven=True),
]
# Eight processes on a few cores are slow: the skewed routing, and all others in one.
STEPS_OF_EIGHT = [Step(max_norm=0.1, accumulation=2, checkpointing=True, uneven=True), Step(skew=True)]
LAYOUTS = [
    (world, {"ep": ep, "dp_replicate": replicas})
    for world in (2, 4, 8)
    for replicas in (1, 2)
    for ep in (1, 2, 4, 8)
    if world % (ep * replicas) == 0
]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=lambda v: str(v))
def test_steps_equal_one_process(world, parallel):
    steps = STEPS_OF_EIGHT if world == 8 else STEPS
    differences, *_ = launch(world, steps_equal_one_process, parallel, steps)
    for step, difference in zip(steps, differences, strict=True):
        assert max(difference.values()) < 1e-5, (step, difference)


@pytest.mark.parametrize("skew", [False, True])
def test_exactly_the_routed_rows_travel(skew):
    ranks = launch(4, bytes_exchanged, 4, skew)
    num_layers = 2  # that route
    for sent, rows in ranks:
        # Forward the tokens' rows to the experts and their results home; backward the gradients, the same ways.
        assert len(sent) == 4 * num_layers
        assert sent[0] == sent[2] == rows
    assert sum(sum(sent) for sent, _ in ranks) == sum(4 * num_layers * rows for _, rows in ranks)


@pytest.mark.parametrize(("world", "ep", "replicas"), [(2, 2, 1), (4, 2, 1), (4, 1, 2)])
def test_saved_shards_load_into_another_layout(world, ep, replicas, tmp_path):
    assert all(launch(world, save_and_load, str(tmp_path), ep, replicas)[0].values())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 3  # the ranks wrote in turn
    from transformers import Dots1ForCausalLM

    sharding_cases.tiny_model().config.save_pretrained(tmp_path)
    loaded, info = Dots1ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = sharding_cases.tiny_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("parallel", [{"ep": 1}, {"ep": 2}])
def test_bf16_computes_in_bf16_but_routes_and_keeps_in_fp32(parallel):
    result = launch(2, bf16_step, parallel)[0]
    assert result["seen"] == {
        "hidden": "torch.bfloat16",
        "weights": "torch.float32",
        "logits": "torch.float32",
        "parameters": "torch.float32",
    }
    assert result["loss"] == pytest.approx(result["expected"], rel=0.02)
