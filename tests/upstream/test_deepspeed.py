"""The internals of DeepSpeed that dots_align.stages.zero leans on. Run this first when its version moves."""

from __future__ import annotations

import inspect


def test_autoep_makes_its_routers_by_the_name_we_replace():
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    source = inspect.getsource(auto_ep_layer.AutoEPMoELayer.__init__)
    assert "self.router = TokenChoiceTopKRouter(" in source
    assert auto_ep_layer.TokenChoiceTopKRouter.__name__ in ("TokenChoiceTopKRouter", "Router")
    router = TokenChoiceTopKRouter(
        dim=8,
        num_experts=4,
        num_expert_groups=1,
        num_limited_groups=1,
        top_k=2,
        score_func="sigmoid",
        route_norm=True,
        route_scale=2.5,
        gate_bias=False,
    )
    assert [name for name, _ in router.named_parameters()] == ["gate.weight"]
    assert "scores = self.gate(x)" in inspect.getsource(TokenChoiceTopKRouter.forward)


def test_autoep_layers_hold_what_is_saved():
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.ep_experts import GroupedExperts

    source = inspect.getsource(AutoEPMoELayer)
    for attribute in ("ep_size", "ep_rank", "ep_group", "experts", "router", "shared_experts"):
        assert f"self.{attribute} = " in source
    shapes = {name: list(p.shape) for name, p in GroupedExperts(8, 6, 4, use_grouped_mm=False).named_parameters()}
    assert shapes == {"w1": [4, 6, 8], "w2": [4, 8, 6], "w3": [4, 6, 8]}  # gate, down, up


def test_partitioned_parameters_convert_others():
    from deepspeed.runtime.zero import Init

    assert {"module", "dtype"} <= inspect.signature(Init.__init__).parameters.keys()
    assert "convert_to_zero_parameters" in inspect.getsource(Init._convert_to_deepspeed_param)
    # Only the main process reads weights; this is what gives them to the others.
    assert "dist.broadcast(param.data" in inspect.getsource(Init._zero_init_param)


def test_transformers_gives_deepspeed_the_parameter_groups_we_set():
    import accelerate
    import transformers

    prepare = inspect.getsource(transformers.Trainer._prepare_for_training)
    assert prepare.index("deepspeed_init(") < prepare.index("self.create_optimizer(") < prepare.index(".prepare(")
    assert 'kwargs["model_parameters"] = optimizer.params' in inspect.getsource(
        accelerate.Accelerator._prepare_deepspeed
    )
