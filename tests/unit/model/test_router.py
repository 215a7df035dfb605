"""What the router is said to have done against what it did."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import Dots1ForCausalLM

from dots_align.config import LoraSection
from dots_align.model.dots1 import load_base_model
from dots_align.model.lora import add_adapter
from dots_align.model.packed import pack
from dots_align.model.router import (
    LoadMonitor,
    find_flips,
    flips_of,
    idle,
    keep_router_in_fp32,
    load_metrics,
    moe_layers,
    record_routes,
)

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_no_token_twice(model: Dots1ForCausalLM, token_ids, use_reentrant: bool) -> None:
    inputs = pack(token_ids(9, 4), CPU).model_inputs()
    model.train()
    monitor = LoadMonitor(model)
    model(**inputs).logits.sum().backward()
    once = monitor.slots()
    load, entropy = monitor.take(), monitor.score_entropy
    assert once.sum(-1).tolist() == [13 * 3] * 2
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(**inputs).logits.sum().backward()
    assert torch.equal(monitor.slots(), 2 * once)
    assert (monitor.take(), monitor.score_entropy) == (load, pytest.approx(entropy))


def test_idle_forwards_are_not_load(model: Dots1ForCausalLM, token_ids) -> None:
    inputs = pack(token_ids(9, 4), CPU).model_inputs()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    monitor = LoadMonitor(model)
    with idle():
        logits = model(**inputs).logits
    logits.sum().backward()
    assert monitor.take() is None
    model(**inputs)
    assert monitor.take() is not None


def test_padding_is_not_load(model: Dots1ForCausalLM, token_ids) -> None:
    """A padded batch (on either side) has the load of its sequences one by one."""
    long, short = token_ids(9, 4)
    monitor = LoadMonitor(model)
    for sequence in (long, short):
        model(input_ids=torch.tensor([sequence]))
    expected, entropy = monitor.take(), monitor.score_entropy
    padding = [0] * 5
    for padded, mask in (([*short, *padding], [1] * 4 + [0] * 5), ([*padding, *short], [0] * 5 + [1] * 4)):
        model(input_ids=torch.tensor([long, padded]), attention_mask=torch.tensor([[1] * 9, mask]))
        assert monitor.take() == expected
        assert monitor.score_entropy == pytest.approx(entropy, abs=1e-6)
    model(input_ids=torch.tensor([long]), attention_mask=torch.zeros(1, 9))
    assert monitor.take() is None


def test_score_entropy_of_even_and_one_sided_scores(model: Dots1ForCausalLM, token_ids) -> None:
    monitor = LoadMonitor(model)
    gates = [block.gate for _, block in moe_layers(model)]
    for gate in gates:
        gate.weight.data.zero_()
    model(input_ids=torch.tensor(token_ids(8)))
    monitor.take()
    assert monitor.score_entropy == pytest.approx(1)
    handles = [
        gate.register_forward_hook(lambda _, __, logits: torch.full_like(logits, -50).index_fill(1, torch.arange(2), 0))
        for gate in gates
    ]
    late = LoadMonitor(model)  # its hooks come after those that change the logits
    model(input_ids=torch.tensor(token_ids(8)))
    late.take()
    assert late.score_entropy == pytest.approx(math.log(2) / math.log(16))
    for handle in handles:
        handle.remove()


def router_io(model: Dots1ForCausalLM, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(logits, chosen, gate values) of the first MoE layer on given states, as the experts receive them."""
    found: list[torch.Tensor] = []
    _, block = moe_layers(model)[0]
    handles = [
        block.gate.register_forward_hook(lambda _, __, logits: found.append(logits)),
        block.experts.register_forward_pre_hook(lambda _, arguments: found.extend(arguments[1:3])),
    ]
    with torch.no_grad():
        block(hidden)
    for handle in handles:
        handle.remove()
    return tuple(found)


@pytest.fixture
def plain_model(model_dir: Path) -> Dots1ForCausalLM:
    """As transformers loads it."""
    return Dots1ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("device", DEVICES)
def test_router_under_autocast_is_the_router_without(plain_model: Dots1ForCausalLM, hidden, device: str) -> None:
    model, hidden = plain_model.to(device), hidden.to(device)
    expected = router_io(model, hidden)
    with torch.autocast(device, torch.bfloat16):
        # Why it is needed at all; once this fails, transformers keeps the router out of autocast itself.
        assert router_io(model, hidden)[0].dtype == torch.bfloat16
        keep_router_in_fp32(model)
        found = router_io(model, hidden)
        assert torch.is_autocast_enabled(device)
    assert [t.dtype for t in found] == [torch.float32, torch.int64, torch.float32]
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, router_io(model, hidden), expected))


def test_fp32_router_of_a_copy_uses_the_weights_of_the_copy(plain_model: Dots1ForCausalLM, hidden) -> None:
    keep_router_in_fp32(plain_model)
    keep_router_in_fp32(plain_model)
    copied = copy.deepcopy(plain_model)
    moe_layers(copied)[0][1].gate.weight.data.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router_io(copied, hidden)[0], 2 * router_io(plain_model, hidden)[0])


@pytest.mark.parametrize("before", [False, True])
def test_router_is_fp32_under_an_adapter_and_sharded(
    plain_model: Dots1ForCausalLM, token_ids, process_group: None, before: bool
) -> None:
    """In whichever order they come; checkpointed, so that backward recomputes the router as well."""
    inputs = {"input_ids": torch.tensor(token_ids(9))}
    found: list[torch.Tensor] = []
    for block in (block for _, block in moe_layers(plain_model)):
        block.gate.register_forward_hook(lambda _, __, logits: found.append(logits))
    if before:
        keep_router_in_fp32(plain_model)
    plain_model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = add_adapter(plain_model, LoraSection(r=2), "base").train()
    for _, block in moe_layers(adapted):
        fully_shard(block.gate)
    for layer in adapted.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(adapted)
    if not before:
        keep_router_in_fp32(adapted)
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted(**inputs).logits.float().square().mean()
    loss.backward()
    assert [logits.dtype for logits in found] == [torch.float32] * 4  # two layers, forward and recomputed
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_correction_bias_stays_fp32_however_the_model_becomes_bf16(
    model_dir: Path, plain_model: Dots1ForCausalLM, hidden
) -> None:
    def biases(of: Dots1ForCausalLM) -> list[torch.Tensor]:
        return [block.gate.e_score_correction_bias for _, block in moe_layers(of)]

    expected = [bias.clone() for bias in biases(plain_model)]
    loaded = load_base_model(model_dir, "bfloat16", "packed", "grouped_mm")
    assert all(map(torch.equal, biases(loaded), expected))  # equal includes the dtype
    keep_router_in_fp32(loaded)
    keep_router_in_fp32(plain_model)
    copied = copy.deepcopy(plain_model)
    for cast in (loaded.bfloat16(), plain_model.to(torch.bfloat16), copied.half()):
        assert moe_layers(cast)[0][1].gate.weight.dtype != torch.float32
        assert all(map(torch.equal, biases(cast), expected))
        assert all(bias.dtype == torch.float32 for bias in biases(cast))
        assert router_io(cast, hidden.to(cast.dtype))[0].dtype == torch.float32
        assert cast.state_dict().keys() == plain_model.state_dict().keys()


def test_a_correction_bias_already_rounded_is_refused(plain_model: Dots1ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"layer 1: .*bfloat16.*before the cast"):
        keep_router_in_fp32(plain_model.to(torch.bfloat16))


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


def test_flips_of_several_sequences_are_those_of_each() -> None:
    numbers, lengths = torch.Generator().manual_seed(0), [3, 1, 40, 2, 7, 30]
    differ = torch.rand(sum(lengths), 5, generator=numbers) < 0.1
    differ[:4] = False
    gaps = torch.rand(differ.shape, generator=numbers)
    each = [flips_of(d, g) for d, g in zip(differ.split(lengths), gaps.split(lengths), strict=True)]
    together = flips_of(differ, gaps, lengths)
    assert torch.equal(together.affected, torch.cat([flips.affected for flips in each]))
    assert together.num_roots == sum(flips.num_roots for flips in each) >= 10
    assert together.root_gap == max(flips.root_gap for flips in each)


def test_only_flips_of_the_lowest_layer_are_roots(routes: torch.Tensor) -> None:
    theirs = routes.clone()
    theirs[1, 1, 1] = 7  # a root
    theirs[3, 1, 0] = 6  # another
    theirs[1, 2], theirs[0, 2, 0] = 0, 7  # the layer above: may follow from those
    flips = find_flips(routes, GAPS, as_bytes(theirs))
    assert flips.affected.tolist() == [True] * 5
    assert flips.num_roots == 2
    assert flips.root_gap == pytest.approx(float(max(GAPS[1, 1], GAPS[3, 1])))
