"""The balance loss against its definition, and the correction bias against what its policy promises."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import Dots1ForCausalLM

from dots_align.config import LoraSection
from dots_align.model.balance import BalanceLoss, BiasPolicy, Sequences, count_sequences, sequence_balance
from dots_align.model.lora import add_adapter
from dots_align.model.packed import pack
from dots_align.model.router import LoadMonitor, idle, load_metrics, moe_layers, record_routes

CPU = torch.device("cpu")
NUM_EXPERTS, K = 16, 3  # of the fixture model


# ---------------------------------------------------------------------------------------------------------- the loss


def by_definition(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The loss of one sequence, expert by expert, as the DeepSeek-V3 report writes it."""
    (length, num_experts), k = logits.shape, chosen.shape[1]
    scores = logits.sigmoid()
    total = logits.new_zeros(())
    for expert in range(num_experts):
        frequency = num_experts / (k * length) * int((chosen == expert).sum())
        probability = sum(scores[t, expert] / scores[t].sum() for t in range(length)) / length
        total = total + frequency * probability
    return total


def one_sequence(length: int) -> Sequences:
    return Sequences.of({"input_ids": torch.zeros(1, length)})


def test_loss_of_a_hand_made_router() -> None:
    """3 tokens, 4 experts of which 2 are chosen. Scores 1/2 and 1/4, so shares 1/3 and 1/6 a token."""
    half, quarter = 0.0, -torch.tensor(3.0).log()
    logits = torch.tensor([[half, half, quarter, quarter]] * 2 + [[quarter, half, quarter, half]])
    chosen = torch.tensor([[0, 1], [1, 0], [3, 1]])
    # f = 4 / (2 * 3) * [2, 3, 0, 1] tokens; P = [5, 6, 3, 4] / 18
    expected = 4 / 6 * (2 * 5 + 3 * 6 + 0 * 3 + 1 * 4) / 18
    assert float(sequence_balance(logits, chosen, one_sequence(3))) == pytest.approx(expected)


def test_loss_of_even_and_of_one_sided_routing() -> None:
    even = torch.arange(8).view(4, 2)
    assert float(sequence_balance(torch.zeros(4, 8), even, one_sequence(4))) == pytest.approx(1)
    crowded = torch.full((4, 8), -40.0).index_fill(1, torch.tensor([0, 1]), 0.0)
    assert float(sequence_balance(crowded, torch.tensor([[0, 1]] * 4), one_sequence(4))) == pytest.approx(8 / 2)


def test_gradient_of_the_loss_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(9)])
    sequences = Sequences.of(
        {"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 4, 9], dtype=torch.int32)}
    )
    assert torch.autograd.gradcheck(lambda x: sequence_balance(x, chosen, sequences), logits)
    expected = by_definition(logits[:4], chosen[:4]) + by_definition(logits[4:], chosen[4:])
    torch.testing.assert_close(sequence_balance(logits, chosen, sequences), expected)


LENGTHS = (4, 9, 1)


def padded_inputs(ids: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
    width = max(map(len, ids))

    def pad(row: list[int], value: int) -> list[int]:
        missing = [value] * (width - len(row))
        return missing + row if left else row + missing

    mask = [pad([1] * len(row), 0) for row in ids]
    return {"input_ids": torch.tensor([pad(row, 7) for row in ids]), "attention_mask": torch.tensor(mask)}


def packed_inputs(ids: list[list[int]], boundaries: bool = True, positions: bool = True) -> dict[str, Any]:
    inputs: dict[str, Any] = pack(ids, CPU).model_inputs()
    if not boundaries:
        del inputs["cu_seq_lens_q"]
    if not positions:
        del inputs["position_ids"]
    return inputs


def generation_inputs(padded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With positions as `generate` makes them: counted from the first real token, 1 on padding."""
    mask = padded["attention_mask"]
    return padded | {"position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)}


LAYOUTS: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
    "boundaries": lambda ids: packed_inputs(ids, positions=False),
    "positions": lambda ids: packed_inputs(ids, boundaries=False),
    "both": packed_inputs,
    "padded right": padded_inputs,
    "padded left": lambda ids: padded_inputs(ids, left=True),
    "padded right, with positions": lambda ids: padded_inputs(ids) | {"position_ids": torch.arange(max(LENGTHS))[None]},
    "padded left, with positions": lambda ids: generation_inputs(padded_inputs(ids, left=True)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_of_every_layout(token_ids, layout: str) -> None:
    inputs = LAYOUTS[layout](token_ids(*LENGTHS))
    sequences = Sequences.of(inputs)
    real = sequences.real.bool()
    assert torch.unique_consecutive(sequences.owner[real], return_counts=True)[1].tolist() == list(LENGTHS)
    assert sequences.sizes[sequences.sizes > 0].tolist() == list(LENGTHS)
    assert count_sequences(inputs) == 3


def test_a_sequence_that_is_all_padding_does_not_count() -> None:
    inputs = {"input_ids": torch.zeros(3, 4), "attention_mask": torch.tensor([[1, 1, 0, 0], [0] * 4, [1] * 4])}
    assert count_sequences(inputs) == 2
    logits, chosen = torch.randn(12, 6), torch.randint(0, 6, (12, 2))
    expected = by_definition(logits[:2], chosen[:2]) + by_definition(logits[8:], chosen[8:])
    torch.testing.assert_close(sequence_balance(logits, chosen, Sequences.of(inputs)), expected)


# ------------------------------------------------------------------------------------------------ the loss in a model


def main_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Some loss of the real tokens, a sum over them."""
    logits = model(**inputs).logits.float()
    mask = inputs.get("attention_mask", torch.ones(logits.shape[:2]))
    return (logits[..., :5].tanh().sum(-1) * mask).sum() / 100


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=2e-5, rtol=0, msg=name)


def expected_gradients(model: Dots1ForCausalLM, ids: list[list[int]], coef: float) -> tuple[dict, float]:
    """Of `main_loss` plus `coef` times the mean over sequences of the loss by definition, each sequence on its own;
    and that mean over sequences and layers.
    """
    model = copy.deepcopy(model)
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    logits: list[torch.Tensor] = []
    for _, block in moe_layers(model):
        block.gate.register_forward_hook(lambda _, __, output: logits.append(output))
        block.experts.register_forward_pre_hook(lambda _, arguments: layers.append((logits.pop(), arguments[1])))
    total = torch.zeros(())
    for row in ids:
        total = total + main_loss(model, {"input_ids": torch.tensor([row])})
    balance = torch.stack([by_definition(*layer) for layer in layers]).sum() / len(ids)
    (total + coef * balance).backward()
    return gradients(model), float(balance.detach()) / 2


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("layout", ["both", "padded left"])
def test_gradients_are_those_of_the_definition(
    model: Dots1ForCausalLM, token_ids, layout: str, checkpointing: bool | None
) -> None:
    ids = token_ids(*LENGTHS)
    expected, value = expected_gradients(model, ids, coef=3.0)
    without, _ = expected_gradients(model, ids, coef=0.0)
    balance = BalanceLoss(model, coef=3.0)
    balance.scale = 1 / len(ids)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    main_loss(model, LAYOUTS[layout](ids)).backward()
    assert_same_gradients(gradients(model), expected)
    assert balance.take() == pytest.approx(value, rel=1e-5)
    assert balance.take() is None
    # The balance is a part of what was compared: without it, gradients are others.
    name = "model.layers.1.mlp.gate.weight"
    assert (without[name] - expected[name]).norm() > 0.1 * without[name].norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cutting_a_step_into_micro_batches_changes_nothing(
    model: Dots1ForCausalLM, token_ids, checkpointing: bool
) -> None:
    """However the sequences are dealt out, and also if backward runs only when every forward is done."""
    ids = token_ids(*LENGTHS, 6, 3)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    balance = BalanceLoss(model, coef=3.0)
    balance.scale = 1 / len(ids)
    found, values = [], []
    for cut in ([[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 1], [0, 3, 2]]):
        main_loss_total = torch.stack([main_loss(model, packed_inputs([ids[i] for i in part])) for part in cut]).sum()
        main_loss_total.backward()
        found.append(gradients(model))
        values.append(balance.take())
        model.zero_grad()
    for other in found[1:]:
        assert_same_gradients(other, found[0])
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_forward_and_inference_are_left_alone(model: Dots1ForCausalLM, token_ids) -> None:
    inputs = packed_inputs(token_ids(*LENGTHS))
    expected = model(**inputs).logits
    balance = BalanceLoss(model, coef=3.0)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)  # no scale is needed here
    assert balance.take() is None
    balance.scale = 1.0
    assert torch.equal(model(**inputs).logits, expected)


def test_value_counts_a_layer_once_that_is_recomputed(model: Dots1ForCausalLM, token_ids) -> None:
    inputs = packed_inputs(token_ids(*LENGTHS))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    balance, values = BalanceLoss(model, coef=3.0), []
    balance.scale = 1.0
    for checkpointed in (True, False):
        model.get_decoder().layers[2].gradient_checkpointing = checkpointed
        main_loss(model, inputs).backward()
        values.append(balance.take())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("case", ["idle", "padding alone"])
def test_a_forward_without_a_sequence_adds_nothing(model: Dots1ForCausalLM, token_ids, case: str) -> None:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    balance = BalanceLoss(model, coef=3.0)
    balance.scale = 1.0
    mask = None if case == "idle" else torch.zeros(1, 9)
    with idle() if case == "idle" else nullcontext():
        logits = model(input_ids=torch.tensor(token_ids(9)), attention_mask=mask).logits
    (0.0 * logits.sum()).backward()
    assert not any(gradient.any() for gradient in gradients(model).values())
    assert balance.take() is None


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_of_a_sharded_model_under_an_adapter(model: Dots1ForCausalLM, token_ids, process_group: None) -> None:
    """FSDP2 moves the inputs of modules and hooks backward into them; the balance has to come through all of it."""
    ids = token_ids(*LENGTHS)
    found = []
    for sharded in (False, True):
        adapted: Any = add_adapter(copy.deepcopy(model), LoraSection(r=2), "base").train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero in a fresh adapter, and with it the gradient of the other half
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        balance = BalanceLoss(adapted, coef=3.0)
        balance.scale = 1 / len(ids)
        if sharded:
            for _, block in moe_layers(adapted):
                fully_shard(block.experts)
            for layer in adapted.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(adapted)
        main_loss(adapted, packed_inputs(ids)).backward()
        local = {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in gradients(adapted).items()}
        found.append((local, balance.take()))
    assert_same_gradients(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1])


def skewed_batches(count: int) -> list[dict[str, Any]]:
    """Sequences over four token ids, so that few experts get nearly everything."""
    generator = torch.Generator().manual_seed(5)
    return [
        pack(torch.randint(40, 44, (4, 24), generator=generator).tolist(), CPU).model_inputs() for _ in range(count)
    ]


def train(model: Dots1ForCausalLM, batches: list[dict[str, Any]], after_step: Callable[[], None] | None = None) -> None:
    """Next-token training."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for inputs in batches:
        logits = model(**inputs).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], inputs["input_ids"][0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step()


def test_training_with_the_loss_evens_out_sequences(model: Dots1ForCausalLM) -> None:
    last = {}
    for coef in (0.0, 1.0):
        trained = copy.deepcopy(model)
        balance = BalanceLoss(trained, coef)
        balance.scale = 1 / 4
        train(trained, skewed_batches(30))
        balance.take()
        train(trained, skewed_batches(1))
        last[coef] = balance.take()
    assert last[1.0] - 1 < 0.8 * (last[0.0] - 1)


# ----------------------------------------------------------------------------------------------------- bias policies


def biases(model: torch.nn.Module) -> torch.Tensor:
    return torch.stack([block.gate.e_score_correction_bias for _, block in moe_layers(model)]).clone()


def test_update_moves_each_bias_against_its_load(model: Dots1ForCausalLM, token_ids) -> None:
    """Once a step, by the load of all its micro-batches; not by inference, nor by what checkpointing recomputes."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before, policy = biases(model), BiasPolicy(LoadMonitor(model), "update", rate=0.01)
    counts = torch.zeros(2, NUM_EXPERTS)
    for ids in (token_ids(9, 4), token_ids(6, 20, seed=1)):
        with record_routes(model) as recorded:
            logits = model(**packed_inputs(ids)).logits
        for layer, chosen in enumerate(recorded.take().unbind(1)):
            counts[layer] += torch.bincount(chosen.flatten().long(), minlength=NUM_EXPERTS)
        logits.sum().backward()
    with torch.no_grad():
        model(**packed_inputs(token_ids(200, seed=2)))
    policy.after_step()
    expected = 0.01 * torch.sign(counts.mean(-1, keepdim=True) - counts)
    torch.testing.assert_close(biases(model) - before, expected, atol=1e-7, rtol=0)
    policy.after_step()  # nothing trained since
    torch.testing.assert_close(biases(model) - before, expected, atol=1e-7, rtol=0)
    extent = biases(model).amax(-1) - biases(model).amin(-1)
    pressure = (counts / counts.mean(-1, keepdim=True) - 1).abs().mean()
    assert policy.take() == pytest.approx({"bias_pressure": float(pressure), "bias_range": float(extent.max())})
    assert policy.take() == pytest.approx({"bias_range": float(extent.max())})


def test_an_expert_with_exactly_its_share_keeps_its_bias(model: Dots1ForCausalLM) -> None:
    """16 tokens, each choosing 3 experts in turn: every expert has 3 slots."""
    (_, block), *_ = moe_layers(model)
    monitor = LoadMonitor(model)
    policy = BiasPolicy(monitor, "update", rate=0.01)
    before = biases(model)
    even = (torch.arange(16)[:, None] + torch.arange(3)) % 16
    block.route_tokens_to_experts = lambda logits: (even, torch.ones(16, 3))
    model(input_ids=torch.arange(16)[None])
    policy.after_step()
    changed = (biases(model) != before).any(-1).tolist()
    assert changed == [False, True]


def test_update_evens_out_a_skewed_stream(model: Dots1ForCausalLM) -> None:
    violations = {}
    for name in ("frozen", "update"):
        trained = copy.deepcopy(model)
        monitor = LoadMonitor(trained)
        policy = BiasPolicy(monitor, name, rate=0.02)
        train(trained, skewed_batches(40), policy.after_step)
        monitor.take()
        train(trained, skewed_batches(4), policy.after_step)
        load = monitor.take()
        assert load is not None
        violations[name] = load_metrics(load)["max_violation"]
    assert violations["update"] < 0.5 * violations["frozen"]


@pytest.mark.parametrize("policy", ["frozen", "track"])
def test_frozen_and_track_leave_the_bias_bitwise(model: Dots1ForCausalLM, policy: Any) -> None:
    before = biases(model)
    train(model, skewed_batches(3), BiasPolicy(LoadMonitor(model), policy, rate=0.02).after_step)
    assert torch.equal(biases(model), before)


def test_frozen_notices_that_a_bias_was_written_to(model: Dots1ForCausalLM) -> None:
    policy = BiasPolicy(LoadMonitor(model), "frozen", rate=0.02)
    policy.after_step()
    assert policy.take() == {}
    moe_layers(model)[1][1].gate.e_score_correction_bias[3] += 1e-6
    with pytest.raises(ValueError, match=r"layer 2 \(1 layers in all\).*frozen"):
        policy.after_step()


def test_track_reports_the_updates_that_update_would_make_to_the_same_load(model: Dots1ForCausalLM) -> None:
    policies = {}
    for name in ("track", "update"):
        trained = copy.deepcopy(model)
        for _, block in moe_layers(trained):
            block.gate.e_score_correction_bias.zero_()
        policies[name] = BiasPolicy(LoadMonitor(trained), name, rate=0.02)
        train(trained, skewed_batches(1), policies[name].after_step)
    assert policies["track"].take() == pytest.approx(policies["update"].take())


def test_interrupted_update_goes_on_from_the_state_dict(model: Dots1ForCausalLM) -> None:
    batches = skewed_batches(6)
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    steps = BiasPolicy(LoadMonitor(whole), "update", rate=0.02)
    with torch.random.fork_rng():
        for trained, policy, part in ((whole, steps, batches), (first, None, batches[:3]), (second, None, batches[3:])):
            if trained is second:
                second.load_state_dict(first.state_dict())
            policy = policy or BiasPolicy(LoadMonitor(trained), "update", rate=0.02)
            for inputs in part:
                trained(**inputs)
                policy.after_step()
    assert torch.equal(biases(second), biases(whole))
    assert not torch.equal(biases(whole), biases(model))


def test_update_under_an_adapter_moves_the_bias_of_the_base(model: Dots1ForCausalLM, token_ids) -> None:
    plain, adapted = copy.deepcopy(model), add_adapter(copy.deepcopy(model), LoraSection(r=2), "base")
    for trained in (plain, adapted):
        policy = BiasPolicy(LoadMonitor(trained), "update", rate=0.02)
        trained(**packed_inputs(token_ids(*LENGTHS)))
        policy.after_step()
    assert torch.equal(biases(plain), biases(adapted.get_base_model()))
    assert not torch.equal(biases(plain), biases(model))


def test_a_bf16_bias_is_refused(model_dir: Path) -> None:
    model = Dots1ForCausalLM.from_pretrained(model_dir)
    with pytest.raises(ValueError, match=r"layer 1: .*bfloat16.*keep_router_in_fp32"):
        BiasPolicy(LoadMonitor(model.to(torch.bfloat16)), "update", rate=1e-3)


# --------------------------------------------------------------------------------------------------------- processes


def sum_over(processes: int) -> Callable[[torch.Tensor], None]:
    """An all-reduce between threads."""
    parts: list[torch.Tensor] = []
    barrier = threading.Barrier(processes, timeout=300)

    def reduce(tensor: torch.Tensor) -> None:
        parts.append(tensor.clone())
        barrier.wait()
        tensor.copy_(torch.stack(parts).sum(0))
        if barrier.wait() == 0:
            parts.clear()
        barrier.wait()

    return reduce


def test_several_processes_report_and_do_what_one_does(model: Dots1ForCausalLM, token_ids) -> None:
    """One of them has no tokens in this step, but takes part."""
    batches = [packed_inputs(token_ids(9, 4)), packed_inputs(token_ids(6, 20, 2, seed=1)), None]

    def step(mine: list[dict[str, Any] | None], reduce: Any = None) -> tuple:
        process = copy.deepcopy(model)
        monitor, balance = LoadMonitor(process, reduce), BalanceLoss(process, 1.0, reduce)
        balance.scale = 1.0
        policy = BiasPolicy(monitor, "update", 0.01)
        for inputs in filter(None, mine):
            process(**inputs)
        policy.after_step()
        return monitor.take(), monitor.score_entropy, balance.take(), policy.take(), biases(process)

    alone = step(batches)
    reduce = sum_over(3)
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda inputs: step([inputs], reduce), batches))
    for load, entropy, balance, metrics, bias in together:
        assert load == alone[0]
        assert (entropy, balance) == pytest.approx(alone[1:3])
        assert metrics == alone[3]
        assert torch.equal(bias, alone[4])
