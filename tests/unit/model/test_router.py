"""What the router is said to have done against what it did."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import Dots1ForCausalLM

from dots_align.config import LoraSection
from dots_align.model.lora import add_adapter
from dots_align.model.packed import pack
from dots_align.model.router import LoadMonitor, find_flips, load_metrics, moe_layers, record_routes

CPU = torch.device("cpu")


def choice_scores(model: Dots1ForCausalLM, inputs: dict) -> list[torch.Tensor]:
    """Sigmoid plus bias [tokens, experts] of every MoE layer, from the router's own input and weight."""
    found: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args: found.append(
                (args[0].flatten(0, 1) @ module.gate.weight.T).sigmoid() + module.gate.e_score_correction_bias
            )
        )
        for _, block in moe_layers(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_recorded_routes_and_gaps_are_the_top_k_of_the_scores(model: Dots1ForCausalLM, token_ids) -> None:
    inputs = pack(token_ids(7, 20, 1), CPU).model_inputs()
    scores = choice_scores(model, inputs)
    with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
        model(**inputs)
        model(**inputs)
    assert len(recorded.routes) == 2
    assert torch.equal(*recorded.routes)
    routes, gaps = recorded.routes[0], recorded.gaps[0]
    assert (routes.shape, routes.dtype, gaps.shape) == ((28, 2, 3), torch.uint8, (28, 2))
    for layer, score in enumerate(scores):
        best = score.topk(4, dim=-1)
        assert torch.equal(routes[:, layer].long().sort(-1).values, best.indices[:, :3].sort(-1).values)
        torch.testing.assert_close(gaps[:, layer], best.values[:, 2] - best.values[:, 3], atol=1e-5, rtol=0)
    # The bias takes part in the choice: without it, other experts are chosen.
    unbiased = scores[0] - moe_layers(model)[0][1].gate.e_score_correction_bias
    assert not torch.equal(scores[0].topk(3).indices.sort(-1).values, unbiased.topk(3).indices.sort(-1).values)


def test_recording_ends_with_the_context_even_after_an_exception(model: Dots1ForCausalLM, token_ids) -> None:
    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    inputs, before = pack(token_ids(3), CPU).model_inputs(), hooks()
    with pytest.raises(RuntimeError, match="stop"), record_routes(model, with_gaps=True):  # noqa: PT012
        assert hooks() > before
        raise RuntimeError("stop")
    assert hooks() == before
    with record_routes(model) as recorded:
        model(**inputs)
    model(**inputs)
    assert recorded.take().shape == (3, 2, 3)


def test_moe_layers_are_found_under_an_adapter(model: Dots1ForCausalLM) -> None:
    adapted = add_adapter(copy.deepcopy(model), LoraSection(r=2), "base")
    assert [i for i, _ in moe_layers(adapted)] == [i for i, _ in moe_layers(model)] == [1, 2]


def test_moe_layers_of_the_bare_decoder(model: Dots1ForCausalLM) -> None:
    assert [i for i, _ in moe_layers(model.get_decoder())] == [1, 2]


def test_routes_and_load_under_an_adapter_are_those_of_its_base(model: Dots1ForCausalLM, token_ids) -> None:
    """A fresh adapter changes nothing, though PEFT wraps the experts."""
    inputs = pack(token_ids(9, 4), CPU).model_inputs()
    found = []
    for watched in (copy.deepcopy(model), add_adapter(model, LoraSection(r=2), "base")):
        monitor = LoadMonitor(watched)
        with record_routes(watched, with_gaps=True) as recorded:
            watched(**inputs)
        found.append((recorded.take(), recorded.gaps[0], monitor.take()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_load_counts_training_forwards_only_and_starts_anew(model: Dots1ForCausalLM, token_ids) -> None:
    monitor = LoadMonitor(model)
    first, second = (pack(token_ids(*sizes, seed=7), CPU).model_inputs() for sizes in ((9, 4), (6,)))
    with torch.no_grad():
        model(**first)
    assert monitor.take() is None
    with record_routes(model) as recorded:
        model(**first)
        model(**second)
    load = monitor.take()
    assert load is not None
    assert monitor.take() is None
    routes = torch.cat(recorded.routes)
    for layer, row in enumerate(load):
        assert sum(row) == pytest.approx(1)
        counts = torch.bincount(routes[:, layer].flatten().long(), minlength=16)
        assert row == pytest.approx((counts / counts.sum()).tolist())


def test_load_metrics_of_even_and_one_sided_loads() -> None:
    even, one_sided = [1 / 8] * 8, [1.0] + [0.0] * 7
    assert load_metrics([even, even]) == pytest.approx({"max_violation": 0, "entropy": 1})
    assert load_metrics([even, one_sided]) == pytest.approx({"max_violation": 7, "entropy": 0.5})
    half = load_metrics([[0.5, 0.5, 0, 0]])
    assert half == pytest.approx({"max_violation": 1, "entropy": math.log(2) / math.log(4)})


@pytest.fixture
def routes() -> torch.Tensor:
    """5 tokens, 3 layers, 2 of 8 experts each."""
    return torch.tensor([[[0, 1], [2, 3], [4, 5]]] * 5, dtype=torch.uint8)


GAPS = torch.arange(15).view(5, 3) / 100 + 0.01


def as_bytes(routes: torch.Tensor) -> bytes:
    return routes.numpy().tobytes()


def test_no_flip(routes: torch.Tensor) -> None:
    theirs = routes.flip(-1)[:4].contiguous()  # in another order: still the same experts; the last token was never fed
    flips = find_flips(routes, GAPS, as_bytes(theirs))
    assert flips.affected.tolist() == [False] * 4
    assert (flips.num_roots, flips.root_gap) == (0, 0.0)


def test_a_flip_affects_its_token_and_everything_after_it(routes: torch.Tensor) -> None:
    theirs = routes.clone()
    theirs[2, 1, 0] = 7
    flips = find_flips(routes, GAPS, as_bytes(theirs[:4]))
    assert flips.affected.tolist() == [False, False, True, True]
    assert flips.num_roots == 1
    assert flips.root_gap == pytest.approx(float(GAPS[2, 1]))


def test_only_flips_of_the_lowest_layer_are_roots(routes: torch.Tensor) -> None:
    theirs = routes.clone()
    theirs[1, 1, 1] = 7  # a root
    theirs[3, 1, 0] = 6  # another
    theirs[1, 2], theirs[0, 2, 0] = 0, 7  # the layer above: may follow from those
    flips = find_flips(routes, GAPS, as_bytes(theirs))
    assert flips.affected.tolist() == [True] * 5
    assert flips.num_roots == 2
    assert flips.root_gap == pytest.approx(float(max(GAPS[1, 1], GAPS[3, 1])))
