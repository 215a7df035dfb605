"""Products of many matrices in one call give what one product for each gives."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dots_align.model import experts
from dots_align.model.experts import grouped_linear
from dots_align.model.native import build
from dots_align.model.native.grouped import Matrices, _batch, multiply

pytestmark = pytest.mark.skipif(_batch() is None, reason="torch brings no MKL here that can do it")
SIZES = [3, 0, 33, 40, 1, 17]
NUMBERS = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=NUMBERS)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("gap", [0, 5], ids=["dense", "gaps"])
def test_rows_times_a_matrix_of_their_own(gap: int, transposed: bool) -> None:
    rows, out = numbers(sum(SIZES), 20 + gap)[:, :20], numbers(sum(SIZES), 7 + gap)
    weight = numbers(len(SIZES), 7, 20 + gap)[..., :20].mT if transposed else numbers(len(SIZES), 20, 7 + gap)[..., :7]
    beside = out[:, 7:].clone()
    assert multiply(Matrices.blocks(rows, SIZES), Matrices.of(weight), Matrices.blocks(out[:, :7], SIZES))
    expected = torch.cat([block @ w for block, w in zip(rows.split(SIZES), weight, strict=True)])
    assert_close(out[:, :7], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, 7:], beside)


def test_rows_times_rows() -> None:
    left, right, out = numbers(sum(SIZES), 9), numbers(sum(SIZES), 20), torch.zeros(len(SIZES), 9, 20)
    blocks = Matrices.blocks(left, SIZES)
    assert multiply(blocks and blocks.turned, Matrices.blocks(right, SIZES), Matrices.of(out))
    pairs = zip(left.split(SIZES), right.split(SIZES), strict=True)
    assert_close(out, torch.stack([a.T @ b for a, b in pairs]), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_read_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Matrices.blocks(numbers(4, 3).double(), [4]) is None
    assert Matrices.blocks(numbers(1, 3).expand(4, 3), [4]) is None
    assert Matrices.of(numbers(2, 6, 6)[..., ::2]) is None
    monkeypatch.setenv(build.SWITCH, "0")
    assert Matrices.blocks(numbers(4, 3), [4]) is None


def outcome(sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(sizes), 20, generator=generator, requires_grad=True)
    weight = torch.randn(len(sizes), 12, 20, generator=generator, requires_grad=True)
    out = grouped_linear(rows, torch.tensor(sizes), weight)
    return [out, *torch.autograd.grad(out, (rows, weight), torch.randn(out.shape, generator=generator))]


@pytest.mark.parametrize(("sizes", "used"), [(SIZES, 3), ([0, 0, 300, 1], 2)], ids=["even", "skewed"])
def test_experts_use_it_unless_a_gradient_is_nearly_all_one_experts(
    sizes: list[int], used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("multiply", "multiply_rows"):
        own = getattr(experts, name)
        monkeypatch.setattr(experts, name, lambda *sides, own=own: calls.append(own(*sides)) or calls[-1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found, again = outcome(sizes), outcome(sizes)
    assert calls == [True] * 2 * used
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    monkeypatch.setenv(build.SWITCH, "0")
    for ours, others in zip(found, outcome(sizes), strict=True):
        assert_close(ours, others, rtol=1e-5, atol=1e-5)
