"""The native kernels compute what transformers' own layers do, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dots_align.model.dots1 import create_model, preset_config
from dots_align.model.experts import _SwiGLU
from dots_align.model.fused import LONGEST, use_kernels
from dots_align.model.native import kernels
from dots_align.model.packed import PackedBatch, pack, pack_shared

if not kernels.available():
    pytest.skip("no compiler here", allow_module_level=True)

NUMBERS = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers_whatever_ran_before() -> None:
    """And such that no two experts score alike but for rounding, which would then choose between them."""
    NUMBERS.manual_seed(1)


def ids(length: int) -> list[int]:
    return torch.randint(0, 512, (length,), generator=NUMBERS).tolist()


def pair(dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[Any, Any]:
    """A model as transformers has it, and the same with kernels; norms of every layer have weights of their own."""
    config = preset_config("tiny", num_hidden_layers=2, vocab_size=512)
    config.update(shape)
    config._attn_implementation, config._experts_implementation = "dots_align_packed", "dots_align_grouped"
    plain: Any = create_model(config, seed=3)
    plain.to(dtype)
    for parameter in plain.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.3, 1.7, generator=NUMBERS)
    fused = copy.deepcopy(plain)
    use_kernels(fused)
    return plain, copy.deepcopy(fused)


def shared_batch() -> PackedBatch:
    """Prompts and responses of one token, of less than a vector, of whole ones, of several blocks of queries."""
    prompts = [ids(n) for n in (1, 20, 70, 5)]
    responses = [[ids(n) for n in lengths] for lengths in ((1, 16, 33), (48, 1), (31, 100, 7), (9,))]
    return pack_shared(prompts, responses, torch.device("cpu"))[0]


def outcome(model: Any, batch: PackedBatch, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and the gradients of every parameter for one gradient of theirs."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model.model(**batch.model_inputs()).last_hidden_state
    states.backward(torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype))
    return states.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(plain: Any, fused: Any, batch: PackedBatch) -> None:
    (states, grads), (others, their_grads) = (outcome(model, batch) for model in (plain, fused))
    torch.testing.assert_close(others, states, atol=1e-5, rtol=0)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            their_grads[name], grad, atol=1e-5 * float(grad.abs().max()), rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 2}, {"head_dim": 64, "num_key_value_heads": 1}], ids=["MHA", "GQA", "MQA"]
)
def test_a_model_with_shared_prompts_has_the_same_states_and_gradients(shape: dict[str, int]) -> None:
    check_equal(*pair(**shape), shared_batch())  # pyright: ignore[reportArgumentType]


def test_so_it_has_without_shared_prompts() -> None:
    check_equal(*pair(), pack([ids(n) for n in (1, 40, 16, 2)], torch.device("cpu")))


def test_each_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("norm", "swiglu", "attention", "gate", "collect", "collect_backward"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, own=own, name=name: called.append(name) or own(*a))
    outcome(pair()[1], shared_batch())
    counts = {"norm": 5, "swiglu": 2, "attention": 2, "gate": 3, "collect": 2, "collect_backward": 1}
    assert {name: called.count(name) for name in set(called)} == counts


def test_under_autocast_they_are_as_close_to_exact_ones() -> None:
    plain, fused = pair()
    batch = shared_batch()
    exact, exact_grads = outcome(copy.deepcopy(plain), batch)
    states, grads = outcome(plain, batch, autocast=True)
    others, their_grads = outcome(fused, batch, autocast=True)
    assert (others - exact).abs().mean() < 1.3 * (states - exact).abs().mean() < 0.1
    for name, grad in exact_grads.items():
        theirs, own = (float((g[name].float() - grad).norm() / grad.norm()) for g in (their_grads, grads))
        assert theirs < 1.3 * own + 1e-3, name


def test_in_bf16_they_are_as_close_to_exact_ones() -> None:
    plain, fused = pair(torch.bfloat16)
    batch = shared_batch()
    exact, exact_grads = outcome(copy.deepcopy(plain).float(), batch)
    (states, grads), (others, their_grads) = outcome(plain, batch), outcome(fused, batch)
    assert others.dtype == states.dtype == torch.bfloat16
    assert (others - exact).abs().mean() < 1.1 * (states - exact).abs().mean() < 0.1
    for name, grad in exact_grads.items():
        theirs, own = (float((g[name].float() - grad).norm() / grad.norm()) for g in (their_grads, grads))
        assert their_grads[name].dtype == torch.bfloat16
        assert theirs < 1.3 * own + 1e-3, name


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_rounds_where_transformers_does(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    plain, fused = (model.model.norm for model in pair(weight_dtype))
    x = (torch.randn(300, 128, generator=NUMBERS) * 3).to(dtype).requires_grad_()
    found, wanted = fused(x), plain(x)
    assert found.dtype == wanted.dtype == torch.promote_types(dtype, weight_dtype)
    different = (found - wanted).abs() > 1e-6 * wanted.abs() + 1e-6
    assert different.float().mean() < 0.002  # where a number lies on the edge between two in bf16
    grad = torch.randn(300, 128, generator=NUMBERS).to(found.dtype)
    tolerance = 1e-5 if dtype == weight_dtype == torch.float32 else 2e-2
    theirs, own = (torch.autograd.grad(y, (x, m.weight), grad) for y, m in ((found, fused), (wanted, plain)))
    for a, b in zip(theirs, own, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_swiglu_of_halves_and_of_matrices(rows: int, dtype: torch.dtype) -> None:
    halves = (torch.randn(rows, 96, generator=NUMBERS) * 4).to(dtype).requires_grad_()
    grad = torch.randn(rows, 48, generator=NUMBERS).to(dtype)
    exact = halves.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    wanted = F.silu(gate) * up
    (wanted_grad,) = torch.autograd.grad(wanted, exact, grad.double())
    close = {"atol": 1e-5, "rtol": 1e-6 if dtype == torch.float32 else 2**-8}  # half a step of bf16's
    for swiglu in (_SwiGLU.apply, lambda x: kernels.swiglu(*x.chunk(2, -1))):
        found = swiglu(halves)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, **close)
        torch.testing.assert_close(torch.autograd.grad(found, halves, grad)[0].double(), wanted_grad, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_collected_by_their_places(tokens: int, weighted: bool, dtype: torch.dtype) -> None:
    rows = torch.randn(3 * tokens, 48, generator=NUMBERS).to(dtype)
    x = rows.double().requires_grad_()
    weights = torch.rand(tokens, 3, generator=NUMBERS, dtype=torch.float64).requires_grad_()
    places = torch.randperm(3 * tokens, generator=NUMBERS).view(3, tokens)
    wanted = (x[places] * (weights.t().unsqueeze(-1) if weighted else 1)).sum(0)
    single = rows, places, weights.detach().float()
    found = kernels.collect(*single[:2], single[2] if weighted else None)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    if weighted:
        grad = torch.randn(tokens, 48, generator=NUMBERS).to(dtype)
        grads = kernels.collect_backward(grad, *single)
        assert [g.dtype for g in grads] == [dtype, torch.float32]
        rounding = 0 if dtype == torch.float32 else 2**-8
        for theirs, own in zip(grads, torch.autograd.grad(wanted, (x, weights), grad.double()), strict=True):
            torch.testing.assert_close(theirs.double(), own, atol=1e-5, rtol=rounding)


def test_threads_change_no_bit() -> None:
    batch, weights = shared_batch(), [torch.rand(32, generator=NUMBERS).requires_grad_() for _ in range(2)]
    tokens = batch.input_ids.shape[1]
    q, k, v = (torch.randn(tokens, 128, generator=NUMBERS).requires_grad_() for _ in range(3))
    angles = batch.position_ids[0, :, None] * torch.rand(16, generator=NUMBERS).repeat(2)
    trees = kernels.Trees.of(batch.cu_seq_lens, batch.prefixes)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = kernels.attention(q, k, v, weights[0], weights[1], (angles.cos(), angles.sin()), trees, 0.2, 1e-5)
            found.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *weights])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("case", ["long", "switched off", "fp64"])
def test_what_they_do_not_know_is_transformers_own(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, dtype = shared_batch(), torch.float32
    if case == "long":
        monkeypatch.setattr(kernels, "attention", None)
        batch = pack([ids(LONGEST + 1)], torch.device("cpu"))
    elif case == "switched off":
        monkeypatch.setenv("DOTS_ALIGN_NATIVE", "0")
    else:
        dtype = torch.float64
    plain, fused = pair(dtype)
    states, others = (outcome(model, batch)[0] for model in (plain, fused))
    if case == "long":
        torch.testing.assert_close(others, states, atol=1e-5, rtol=0)
    else:
        assert torch.equal(others, states)
