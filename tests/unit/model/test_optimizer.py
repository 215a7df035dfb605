"""AdamW: the same as torch's, with fp32 masters where they are needed, and a state that comes back from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dots_align.config import OptimSection
from dots_align.model.optimizer import STATE_TENSORS, ShardedAdamW, load_optimizer, make_optimizer, save_optimizer

KEYS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (9,), (0, 3))]


def take_steps(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number + 1)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("offload", [False, True])
def test_it_is_torchs_adamw(offload: bool) -> None:
    ours, theirs = parameters(), parameters()
    take_steps(ShardedAdamW(ours, **KEYS, offload=offload), ours, 5)
    take_steps(torch.optim.AdamW(theirs, **KEYS, fused=True), theirs, 5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_small_updates_of_bf16_weights_add_up_in_their_masters() -> None:
    keys = {**KEYS, "lr": 1e-4, "weight_decay": 0.0}
    low, high = [parameters(torch.bfloat16)[0]], [nn.Parameter(parameters(torch.bfloat16)[0].detach().float())]
    before = low[0].detach().clone()
    optimizer = ShardedAdamW(low, **keys)
    take_steps(optimizer, low, 60)
    reference = torch.optim.AdamW(high, **keys)
    for number in range(60):
        high[0].grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(number + 1)).bfloat16().float()
        reference.step()
    assert not torch.equal(low[0], before)
    torch.testing.assert_close(optimizer.state_of(low[0])["master"], high[0].detach())
    assert torch.equal(low[0], high[0].detach().bfloat16())


def test_a_parameter_without_gradient_stays() -> None:
    trained = parameters()
    optimizer = ShardedAdamW(trained, **KEYS)
    trained[0].grad = torch.ones_like(trained[0])
    before = trained[1].detach().clone()
    optimizer.step()
    assert torch.equal(trained[1], before)


def test_weight_decay_spares_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4))
    optimizer = make_optimizer(model.named_parameters(), OptimSection(weight_decay=0.1), offload=False)
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in optimizer.param_groups] == [
        (0.1, [2]),
        (0.0, [1]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_goes_on_as_if_never_interrupted(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = parameters(dtype)[:2]
    optimizer = ShardedAdamW(whole, **KEYS)
    take_steps(optimizer, whole, 3)
    save_optimizer(optimizer, {"a": whole[0], "b": whole[1]}, tmp_path)
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    other = ShardedAdamW(resumed, **KEYS)
    load_optimizer(other, {"a": resumed[0], "b": resumed[1]}, tmp_path)
    take_steps(optimizer, whole, 2, first=3)
    take_steps(other, resumed, 2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all(p.suffix == ".safetensors" for p in (tmp_path / STATE_TENSORS).iterdir())  # nothing to unpickle


def test_the_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    trained = parameters()[:2]
    optimizer = ShardedAdamW(trained, **KEYS)
    save_optimizer(optimizer, {"a": trained[0], "b": trained[1]}, tmp_path)
    with pytest.raises(ValueError, match=r"optimizer state is of other parameters; (b|c) is not in both"):
        load_optimizer(optimizer, {"a": trained[0], "c": trained[1]}, tmp_path)


def test_a_disk_that_takes_no_more_is_an_os_error(tmp_path: Path, small_files: None) -> None:
    """torch alone raises what is no `Exception`."""
    trained = [nn.Parameter(torch.ones(4000))]
    optimizer = ShardedAdamW(trained, **KEYS)
    take_steps(optimizer, trained, 1)
    with pytest.raises(OSError, match="File too large"):
        save_optimizer(optimizer, {"a": trained[0]}, tmp_path)
