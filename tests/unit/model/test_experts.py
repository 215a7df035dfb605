"""The grouped experts give what transformers' loop over experts gives, outputs and gradients, wherever tokens go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.models.dots1.modeling_dots1 import Dots1NaiveMoe

from dots_align.model.dots1 import load_base_model, preset_config
from dots_align.model.experts import IMPLEMENTATION, _Batch, _Gather, _sort_by_expert, experts_forward, grouped_linear

HIDDEN, WIDTH, EXPERTS, TOP_K = 32, 24, 8, 3
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def chosen_at_random(tokens: int, k: int = TOP_K, among: int = EXPERTS) -> torch.Tensor:
    return torch.rand(tokens, among, generator=torch.Generator().manual_seed(tokens)).topk(k).indices


ROUTINGS = {
    "random": chosen_at_random(50),
    "many": chosen_at_random(400),
    "unused experts": chosen_at_random(50, among=4) + 2,
    "one expert": torch.full((300, 1), 5),
    "one token": chosen_at_random(1),
    "two tokens to one": torch.tensor([[7, 0], [0, 7]]),
}


class Case:
    """Experts with tokens on their way to them, and the gradient that comes back."""

    def __init__(self, index: torch.Tensor, dtype: torch.dtype = torch.float32, device: str = "cpu", **config: Any):
        torch.manual_seed(0)
        shape = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, **config}
        self.module = Dots1NaiveMoe(preset_config("tiny", **shape)).double()
        for weight in self.module.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        self.index = index
        self.hidden = torch.randn(len(index), shape["hidden_size"], dtype=torch.float64)
        self.gates = torch.rand(index.shape, dtype=torch.float64)
        self.grad = torch.randn_like(self.hidden)
        self.to(dtype, device)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same numbers in another dtype; gates never in less than fp32, as the router gives them."""
        self.module.to(device, dtype)
        self.index = self.index.to(device)
        self.hidden = self.hidden.detach().to(device, dtype).requires_grad_()
        self.grad = self.grad.to(device, dtype)
        self.gates = self.gates.detach().to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        return self

    def forward(self, implementation: str = IMPLEMENTATION) -> torch.Tensor:
        self.module.config._experts_implementation = implementation
        return self.module(self.hidden, self.index, self.gates)

    def run(self, implementation: str = IMPLEMENTATION) -> dict[str, torch.Tensor]:
        """The output and all gradients."""
        out = self.forward(implementation)
        return {"out": out.detach(), **self.gradients(out)}

    def gradients(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = {"hidden": self.hidden, "gates": self.gates, **dict(self.module.named_parameters())}
        return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), self.grad), strict=True))


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest distance of any of them from the exact one, relative to its norm."""
    distances = [(found[name].double() - exact[name]).norm() / exact[name].norm() for name in exact]
    return float(torch.stack(distances).max())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equal_to_the_loop_over_experts(routing: str) -> None:
    case = Case(ROUTINGS[routing])
    found, expected = case.run(), case.run("eager")
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_accurate_in_fp32_and_bf16(routing: str) -> None:
    """bf16 weights and inputs are rounded before the exact run, so what is measured is the computation alone."""
    assert error(Case(ROUTINGS[routing]).run(), Case(ROUTINGS[routing]).to(torch.float64).run("eager")) < 1e-6
    case = Case(ROUTINGS[routing], torch.bfloat16)
    found = case.run()
    assert found["gate_up_proj"].dtype == torch.bfloat16
    assert found["gates"].dtype == torch.float32
    assert error(found, case.to(torch.float64).run("eager")) < 1e-2


def test_gradients_are_the_derivatives() -> None:
    case = Case(ROUTINGS["unused experts"][:6], torch.float64, hidden_size=6, moe_intermediate_size=4)

    def function(hidden: torch.Tensor, gates: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        replaced = {"gate_up_proj": gate_up, "down_proj": down}
        case.module.config._experts_implementation = IMPLEMENTATION
        return torch.func.functional_call(case.module, replaced, (hidden, case.index, gates))

    inputs = (case.hidden, case.gates, case.module.gate_up_proj, case.module.down_proj)
    assert torch.autograd.gradcheck(function, inputs)


def test_another_activation_than_silu() -> None:
    case = Case(ROUTINGS["random"], torch.float64, hidden_act="gelu")
    assert error(case.run(), case.run("eager")) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_without_tokens_get_a_zero_gradient(dtype: torch.dtype) -> None:
    case = Case(ROUTINGS["unused experts"], dtype)
    found = case.run()
    for name in ("gate_up_proj", "down_proj"):
        used = found[name].flatten(1).any(1).tolist()
        assert used == [False, False, True, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    found = Case(torch.empty(0, TOP_K, dtype=torch.long), dtype).run()
    assert found["out"].shape == found["hidden"].shape == (0, HIDDEN)
    assert found["gates"].shape == (0, TOP_K)
    assert not found["gate_up_proj"].any()
    assert not found["down_proj"].any()


def test_autocast_computes_in_bf16_and_keeps_the_rest_in_fp32() -> None:
    case = Case(ROUTINGS["many"])
    exact = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        out = case.forward()
    found = {"out": out.detach(), **case.gradients(out)}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert 1e-4 < error(found, {name: tensor.double() for name, tensor in exact.items()}) < 1e-2
    in_bf16 = Case(ROUTINGS["many"], torch.bfloat16).run()["out"].float()
    assert (found["out"] - in_bf16).norm() < 1e-2 * in_bf16.norm()


def test_gates_are_applied_in_fp32() -> None:
    case = Case(ROUTINGS["random"])
    factor = 1 + 2**-12  # 1 in bf16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = case.forward()
        case.gates.mul_(factor)
        assert_close(case.forward(), out * factor, rtol=1e-6, atol=1e-6)


def test_gradients_of_a_tokens_rows_are_added_in_fp32() -> None:
    """256 and eight times 1 are 264; in bf16 each 1 would be lost."""
    order, places, _ = _sort_by_expert(torch.arange(9)[None], 9)
    hidden = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    rows = _Gather.apply(hidden, order, places, torch.bfloat16)
    rows.backward(torch.tensor([256.0] + 8 * [1.0], dtype=torch.bfloat16)[:, None].expand(9, 2))
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[264.0, 264.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_agree_in_every_bit(dtype: torch.dtype) -> None:
    case = Case(ROUTINGS["many"], dtype)
    first, second = case.run(), case.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_token_does_not_depend_on_the_others() -> None:
    case = Case(ROUTINGS["many"])
    together = case.run()
    case.index, case.grad = case.index[7:20], case.grad[7:20]
    case.hidden, case.gates = (t.detach()[7:20].clone().requires_grad_() for t in (case.hidden, case.gates))
    alone = case.run()
    for name in ("out", "hidden", "gates"):
        assert_close(alone[name], together[name][7:20], rtol=1e-5, atol=1e-5)


def test_an_expanded_gradient() -> None:
    """The gradient of a sum has strides of 0, which torch's grouped_mm refuses on CPUs."""
    case = Case(ROUTINGS["random"])
    rows, counts = torch.randn(10, HIDDEN), torch.tensor([0, 3, 0, 0, 7, 0, 0, 0])
    grouped_linear(rows, counts, case.module.gate_up_proj).sum().backward()
    assert case.module.gate_up_proj.grad is not None
    assert_close(case.module.gate_up_proj.grad[4], rows[3:].sum(0).expand(2 * WIDTH, HIDDEN))


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """What a forward keeps for its backward, parameters aside."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def test_frozen_weights_and_inputs_cost_nothing() -> None:
    case = Case(ROUTINGS["many"])
    everything, all_saved = case.run(), saved_bytes(case.forward)
    case.module.requires_grad_(False)
    through = torch.autograd.grad(case.forward(), (case.hidden, case.gates), case.grad)
    assert torch.equal(through[0], everything["hidden"])
    assert torch.equal(through[1], everything["gates"])
    rows = case.index.numel() * 4
    assert saved_bytes(case.forward) <= all_saved - rows * (HIDDEN + WIDTH)  # neither linear layer keeps its input
    case.gates.requires_grad_(False)
    assert saved_bytes(case.forward) <= all_saved - rows * (2 * HIDDEN + WIDTH)  # nor does the combination
    case.hidden.requires_grad_(False)
    assert not case.forward().requires_grad


def test_weights_train_under_inputs_that_do_not() -> None:
    case = Case(ROUTINGS["random"])
    everything = case.run()
    case.hidden.requires_grad_(False)
    case.gates.requires_grad_(False)
    case.forward().backward(case.grad)
    for name, weight in case.module.named_parameters():
        assert weight.grad is not None
        assert torch.equal(weight.grad, everything[name])


def test_only_the_gates_train() -> None:
    case = Case(ROUTINGS["random"])
    everything = case.run()
    case.module.requires_grad_(False)
    case.hidden.requires_grad_(False)
    (found,) = torch.autograd.grad(case.forward(), case.gates, case.grad)
    assert torch.equal(found, everything["gates"])


def test_without_gradients() -> None:
    case = Case(ROUTINGS["random"])
    with torch.no_grad():
        out = case.forward()
    assert not out.requires_grad
    assert torch.equal(out, case.forward())


def test_activation_checkpointing() -> None:
    case = Case(ROUTINGS["many"])
    everything = case.run()
    out = checkpoint(case.forward, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    found = case.gradients(out)
    assert all(torch.equal(found[name], everything[name]) for name in found)


def test_other_work_meanwhile() -> None:
    case = Case(ROUTINGS["random"])
    aside = torch.ones(3)
    arguments = (case.module, case.hidden, case.index, case.gates)
    out, returned = experts_forward(*arguments, meanwhile=lambda: aside)
    assert returned is aside
    assert torch.equal(out, experts_forward(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 4000], ids=["narrow", "wide"])
@pytest.mark.parametrize("sizes", [[3, 0, 33, 4], [0, 0, 0, 100], [129, 31, 17, 16], [0, 0, 0, 0]], ids=str)
def test_grouped_linear_of_any_sizes(sizes: list[int], width: int, dtype: torch.dtype) -> None:
    """Narrow like a low-rank adapter, or too wide for one batched product; with weights in a dtype of their own."""
    torch.manual_seed(0)
    weight = torch.randn(len(sizes), width, 20, requires_grad=True)
    rows = torch.randn(sum(sizes), 20, dtype=dtype, requires_grad=True)
    grad = torch.randn(sum(sizes), width, dtype=dtype)
    out = grouped_linear(rows, torch.tensor(sizes), weight)
    found = [out, *torch.autograd.grad(out, (rows, weight), grad)]
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32]

    exact = [rows.detach().double(), weight.detach().to(dtype).double(), grad.double()]
    blocks, blocks_grad = exact[0].split(sizes), exact[2].split(sizes)
    expected = [
        torch.cat([block @ w.T for block, w in zip(blocks, exact[1], strict=True)]),
        torch.cat([g @ w for g, w in zip(blocks_grad, exact[1], strict=True)]),
        torch.stack([g.T @ block for g, block in zip(blocks_grad, blocks, strict=True)]),
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, right in zip(found, expected, strict=True):
        assert (ours.double() - right).norm() <= tolerance * right.norm()


def test_one_batched_product_only_where_it_is_cheaper() -> None:
    """In bf16 on a CPU, for small matrices, and if padding costs less than to begin many products."""

    def batched(sizes: list[int], width: int = 64, dtype: torch.dtype = torch.bfloat16) -> bool:
        rows, weight = torch.zeros(sum(sizes), 128, dtype=dtype), torch.zeros(len(sizes), width, 128, dtype=dtype)
        return _Batch.of(torch.tensor(sizes), sizes, rows, weight) is not None

    assert batched([30, 35, 28, 33])
    assert batched([0, 64])
    assert not batched([30, 35, 28, 33], dtype=torch.float32)
    assert not batched([30, 35, 28, 33], width=1024)
    assert not batched([30, 5000, 28, 33])


def test_weights_of_many_megabytes_train() -> None:
    """Their gradients lie in memory of their own, which must behave like any other."""
    torch.manual_seed(0)
    weight = torch.randn(36, 512, 512).requires_grad_()  # 36 MiB
    rows, counts = torch.randn(72, 512), torch.full((36,), 2)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    expected = torch.einsum("ebo,ebi->eoi", torch.ones(36, 2, 512), rows.view(36, 2, 512))
    before = weight.detach().clone()
    for _ in range(2):  # the second adds to the first
        grouped_linear(rows, counts, weight).sum().backward()
    assert weight.grad is not None
    assert_close(weight.grad, 2 * expected)
    optimizer.step()
    optimizer.zero_grad()
    assert_close(weight.detach(), before - 2 * expected)


def test_a_whole_model_gives_the_same_logits(model_dir: Path, token_ids: Callable[..., list[list[int]]]) -> None:
    ids = torch.tensor(token_ids(60))
    logits = []
    for implementation in ("grouped", "grouped_mm"):
        model = load_base_model(model_dir, "float32", "sdpa", implementation).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("routing", ROUTINGS)
def test_accurate_on_a_gpu(routing: str) -> None:
    assert (
        error(Case(ROUTINGS[routing], device="cuda").run(), Case(ROUTINGS[routing], torch.float64).run("eager")) < 1e-3
    )
    case = Case(ROUTINGS[routing], torch.bfloat16, "cuda")
    found = case.run()
    assert error({k: v.cpu() for k, v in found.items()}, case.to(torch.float64).run("eager")) < 1e-2


@pytest.mark.gpu
@on_gpu
def test_nothing_is_read_back_from_a_gpu() -> None:
    case = Case(ROUTINGS["many"], torch.bfloat16, "cuda")
    first = case.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[name], second[name]) for name in first)
