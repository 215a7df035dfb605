"""What prefixes begin with is attended to for all of them together, and nobody can tell."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dots_align.model.dots1 import create_model, preset_config
from dots_align.model.router import keep_router_in_fp32
from dots_align.rollout.attention import CachedStep
from dots_align.rollout.kv_cache import BlockPool
from dots_align.rollout.native import native_forward
from dots_align.rollout.plan import MIN_TRUNK, ForwardPlan, find_trunks

NO_TRUNKS = {"trunk_starts": np.zeros(1, np.int32), "trunk_lengths": np.zeros(0, np.int32)}
DTYPES = [torch.float32, torch.bfloat16]


def ints(values: object) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)


def tables_of(rows: list[list[int]]) -> np.ndarray:
    width = max(map(len, rows))
    return ints([row + row[:1] * (width - len(row)) for row in rows])


@st.composite
def decoding(draw: st.DrawFn) -> tuple[ForwardPlan, int, int]:
    """A step of many sequences, some of whose prefixes begin alike: (plan, size and number of blocks)."""
    size = draw(st.sampled_from([4, 7, 16, 64]))
    next_block = iter(range(10**6))

    def new(tokens: int) -> list[int]:
        return [next(next_block) for _ in range(-(-tokens // size))]

    prefixes: list[tuple[list[int], int]] = []
    for _ in range(draw(st.integers(1, 3))):
        trunk = new(draw(st.integers(1, 260)))
        for _ in range(draw(st.integers(1, 9))):
            part = trunk[: draw(st.integers(max(len(trunk) - 2, 0), len(trunk)))]
            rest = draw(st.integers(1, 90))
            prefixes.append((part + new(rest), len(part) * size + rest))
    prefixes = draw(st.permutations(prefixes))
    tables, lengths = tables_of([blocks for blocks, _ in prefixes]), ints([length for _, length in prefixes])
    order, trunk_starts, trunk_lengths = find_trunks(tables, lengths, size)
    answers = np.array([draw(st.sampled_from([1, 1, 1, 2, 17, 40])) for _ in prefixes])
    cached = ints([draw(st.integers(0, 70)) for _ in range(answers.sum())])
    count = len(cached)
    lengths = lengths[order]
    plan = ForwardPlan(
        tokens=ints(np.arange(count) % 500),
        positions=ints(np.repeat(lengths, answers) + cached),
        starts=ints(range(count + 1)),
        cached=cached,
        tables=tables_of([new(int(n) + 1) for n in cached]),
        prefix_starts=ints([0, *np.cumsum(answers)]),
        prefix_tables=tables[order],
        prefix_lengths=lengths,
        logits_at=ints(range(count)),
        trunk_starts=trunk_starts,
        trunk_lengths=trunk_lengths,
    )
    return plan, size, next(next_block)


def random_pool(layers: int, heads: int, width: int, size: int, blocks: int, dtype: torch.dtype) -> BlockPool:
    pool = BlockPool(layers, heads, width, blocks, size, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(blocks)
    for part in (*pool.keys, *pool.values):
        part.copy_(torch.randn(part.shape, generator=generator))
    return pool


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=decoding())
@settings(max_examples=15, deadline=None)
def test_the_native_forward_gives_the_same_bits_with_trunks(
    dtype: torch.dtype, drawn: tuple[ForwardPlan, int, int]
) -> None:
    plan, size, blocks = drawn
    config = preset_config("tiny", num_hidden_layers=2, hidden_size=64, num_attention_heads=2, num_experts_per_tok=2)
    model = create_model(config, 0).eval()
    keep_router_in_fp32(model)
    native = native_forward(model.to(dtype))  # pyright: ignore[reportArgumentType]
    if native is None:
        pytest.skip("no native forward here")
    shape = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    logits, alone = (
        native(p, random_pool(*shape, size, blocks, dtype), False)[0] for p in (plan, replace(plan, **NO_TRUNKS))
    )
    assert bool(logits.isfinite().all())
    assert torch.equal(logits, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=decoding())
@settings(max_examples=15, deadline=None)
def test_torch_gives_the_same_numbers_with_trunks(dtype: torch.dtype, drawn: tuple[ForwardPlan, int, int]) -> None:
    plan, size, blocks = drawn
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(plan.num_tokens, 2, 16, generator=generator, dtype=torch.float32).to(dtype) for _ in range(3)
    )
    found, wanted = (
        CachedStep(p, random_pool(1, 2, 16, size, blocks, dtype)).attend(0, query, key, value, 0.25)
        for p in (plan, replace(plan, **NO_TRUNKS))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_prefixes_are_put_together_by_what_they_begin_with() -> None:
    long, other = [*range(10, 20)], [*range(30, 36)]
    rows = [
        [1, 2, 3, 4, 5],  # begins like nobody
        [*long, 100],
        [*other, 101, 102],
        [*long, 103],
        [*long[:8], 104, 105],  # a shorter beginning is still worth it
        [*other, 106],
        [*long[:1], 107, 108, 109],  # but not one block of it
    ]
    lengths = ints([16 * len(row) - 3 for row in rows])
    order, starts, trunks = find_trunks(tables_of(rows), lengths, 16)
    assert sorted(order.tolist()) == list(range(7))
    groups = [set(order[a:b].tolist()) for a, b in pairwise(starts)]
    assert dict(zip(map(frozenset, groups), trunks.tolist(), strict=True)) == {
        frozenset({1, 3, 4}): 8 * 16,
        frozenset({2, 5}): 6 * 16,
    }
    assert set(order[: starts[0]].tolist()) == {0, 6}


def test_a_trunk_is_never_all_of_a_prefix() -> None:
    row = [*range(2 * MIN_TRUNK // 16)]
    tables = tables_of([row, row])
    for length in (2 * MIN_TRUNK, 2 * MIN_TRUNK - 15):
        _, starts, trunks = find_trunks(tables, ints([length, length]), 16)
        assert starts.tolist() == [0, 2]
        assert trunks.tolist() == [2 * MIN_TRUNK - 16]


def test_without_anything_in_common_the_order_stays() -> None:
    order, starts, trunks = find_trunks(tables_of([[3, 1], [2], [7, 8, 9]]), ints([20, 5, 40]), 16)
    assert order.tolist() == [0, 1, 2]
    assert starts.tolist() == [3]
    assert len(trunks) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trunk_starts": ints([0, 3]), "trunk_lengths": ints([1])}, "number of prefixes"),
        ({"trunk_starts": ints([-1, 1]), "trunk_lengths": ints([1])}, "number of prefixes"),
        ({"trunk_starts": ints([0, 1]), "trunk_lengths": ints([6])}, "a trunk is longer"),
        ({"trunk_starts": ints([0, 1]), "trunk_lengths": ints([-1])}, "a trunk is longer"),
        ({"trunk_starts": ints([0])}, "trunk_starts is int32"),
    ],
)
def test_a_broken_trunk_is_refused(wrong: dict[str, np.ndarray], message: str) -> None:
    native = native_forward(create_model(preset_config("tiny"), 0).eval())
    if native is None:
        pytest.skip("no native forward here")
    plan = ForwardPlan(
        tokens=ints([1]),
        positions=ints([5]),
        starts=ints([0, 1]),
        cached=ints([0]),
        tables=ints([[1]]),
        prefix_starts=ints([0, 1]),
        prefix_tables=ints([[0]]),
        prefix_lengths=ints([5]),
        logits_at=ints([0]),
        trunk_starts=ints([0, 1]),
        trunk_lengths=ints([4]),
    )
    pool = random_pool(native.config.num_hidden_layers, 4, 32, 16, 2, torch.float32)
    native(plan, pool, False)
    with pytest.raises(ValueError, match=message):
        native(replace(plan, **wrong), pool, False)
