"""The native forward: the torch model's numbers, the same bits whatever runs beside, and no demands on the machine."""

from __future__ import annotations

import copy
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_checks import TIE
from transformers import Dots1ForCausalLM

from dots_align.config import LoraSection
from dots_align.model.dots1 import create_model, preset_config
from dots_align.model.lora import add_adapter
from dots_align.model.native import build as compiling
from dots_align.model.router import keep_router_in_fp32, moe_layers, record_routes
from dots_align.rollout.kv_cache import BlockPool
from dots_align.rollout.native import NativeForward, build, native_forward, why_not
from dots_align.rollout.plan import ForwardPlan, find_trunks
from dots_align.rollout.sampling import SamplingTable, sample

try:
    build.load()
except build.Unavailable as error:
    pytest.skip(f"no native forward here: {error}", allow_module_level=True)

PRECISIONS = [torch.float32, torch.bfloat16]


def make_model(dtype: torch.dtype, preset: str = "tiny", **overrides: int) -> Dots1ForCausalLM:
    """A random model whose correction bias changes the router's choices."""
    model = create_model(preset_config(preset, **overrides), 0).eval()
    generator = torch.Generator().manual_seed(1)
    for _, block in moe_layers(model):
        bias = block.gate.e_score_correction_bias
        bias.copy_(0.2 * torch.rand(bias.shape, generator=generator))
    keep_router_in_fp32(model)
    return model.to(dtype)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module", params=PRECISIONS, ids=["fp32", "bf16"])
def tiny(request: pytest.FixtureRequest) -> Dots1ForCausalLM:
    return make_model(request.param, num_hidden_layers=3, hidden_size=96, num_attention_heads=2, num_experts_per_tok=3)


def make(model: Dots1ForCausalLM) -> NativeForward:
    native = native_forward(model)
    assert native is not None, why_not(model)
    return native


@dataclass
class Chain:
    tokens: list[int]
    prefix: Chain | None = None
    cached: int = 0
    blocks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    beginning: Chain | None = None
    """A prompt that begins alike; whole blocks of it are shared."""
    num_alike: int = 0


class Cache:
    """Chains in a pool, advanced by as many tokens at a time as a test likes."""

    def __init__(self, model: Dots1ForCausalLM, block_size: int = 16, num_blocks: int = 256) -> None:
        config, self.native = model.config, make(model)
        self.pool = BlockPool(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, num_blocks, block_size,
            model.dtype, torch.device("cpu"),
        )  # fmt: skip

    def plan(self, advances: list[tuple[Chain, int]], logits_at: list[int] | None = None) -> ForwardPlan:
        size = self.pool.block_size
        for chain, count in advances:
            missing = -(-(chain.cached + count) // size) - len(chain.blocks)
            if missing > 0:
                chain.blocks = np.concatenate([chain.blocks, self.pool.take(missing)])
        prefixes: list[Chain] = []
        for chain, _ in advances:
            if chain.prefix is not None and not any(chain.prefix is p for p in prefixes):
                prefixes.append(chain.prefix)
        found, trunk_starts, trunk_lengths = np.arange(0), ints([0]), ints([])
        if prefixes:
            found, trunk_starts, trunk_lengths = find_trunks(table(prefixes), ints([p.cached for p in prefixes]), size)
        prefixes = [prefixes[i] for i in found]
        order = [a for a in advances if a[0].prefix is None]
        prefix_starts = [sum(n for _, n in order)]
        for prefix in prefixes:
            order += [a for a in advances if a[0].prefix is prefix]
            prefix_starts.append(sum(n for _, n in order))
        self.order = order
        starts = np.cumsum([0] + [n for _, n in order])
        return ForwardPlan(
            tokens=ints([t for c, n in order for t in c.tokens[c.cached : c.cached + n]]),
            positions=ints([len(c.prefix.tokens) * (c.prefix is not None) + c.cached + i if c.prefix else c.cached + i
                            for c, n in order for i in range(n)]),
            starts=ints(starts),
            cached=ints([c.cached for c, _ in order]),
            tables=table([c for c, _ in order]),
            prefix_starts=ints(prefix_starts),
            prefix_tables=table(prefixes),
            prefix_lengths=ints([p.cached for p in prefixes]),
            logits_at=ints(list(range(starts[-1])) if logits_at is None else logits_at),
            trunk_starts=trunk_starts,
            trunk_lengths=trunk_lengths,
        )  # fmt: skip

    def share_beginning(self, chain: Chain) -> None:
        """Lets a chain begin with the blocks of another one."""
        assert chain.beginning is not None
        count = chain.num_alike // self.pool.block_size
        chain.blocks = chain.beginning.blocks[:count].copy()
        chain.cached = count * self.pool.block_size

    def advance(self, advances: list[tuple[Chain, int]]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Logits and routes of the new tokens by id of their chain."""
        plan = self.plan(advances)
        logits, routes = self.native(plan, self.pool, True)
        assert routes is not None
        found = {}
        for index, (chain, count) in enumerate(self.order):
            part = slice(int(plan.starts[index]), int(plan.starts[index + 1]))
            found[id(chain)] = logits[part], torch.from_numpy(routes[part])
            chain.cached += count
        return found

    def stored(self, chain: Chain) -> torch.Tensor:
        """Keys and values of a chain's tokens through all layers."""
        rows = torch.from_numpy(chain.blocks).long()
        layers = [layer[rows].flatten(0, 1)[: chain.cached] for layer in (*self.pool.keys, *self.pool.values)]
        return torch.stack(layers)


def ints(values: object) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)


def table(chains: list[Chain]) -> np.ndarray:
    width = max((len(c.blocks) for c in chains), default=0)
    return ints([[*c.blocks, *[0] * (width - len(c.blocks))] for c in chains]).reshape(len(chains), width)


def random_tokens(count: int, seed: int, vocabulary: int = 500) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def teacher_forced(model: Dots1ForCausalLM, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain transformers: logits [n, V], routes [n, L, k], gaps [n, L]."""
    with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits, recorded.take(), recorded.gaps[0]


def agreeing(routes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[n] tokens before any that chose other experts."""
    same = (routes.sort(-1).values == other.sort(-1).values).flatten(1).all(-1)
    return same.cumprod(0).bool()


# ------------------------------------------------------------------------------------------------ the model's numbers

SHAPES = {
    "tiny": ("tiny", {}),
    "small, shrunk": ("small", {"num_hidden_layers": 3, "vocab_size": 1000}),
    "heads of 16, odd vocabulary": ("tiny", {"num_attention_heads": 8, "vocab_size": 509}),
    "heads of 96, nine experts of which eight work": (
        "tiny",
        {"hidden_size": 96, "num_attention_heads": 1, "n_routed_experts": 9, "num_experts_per_tok": 8},
    ),
    "dense layers only": ("tiny", {"first_k_dense_replace": 4}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_logits_and_routes_are_those_of_transformers(shape: str) -> None:
    preset, overrides = SHAPES[shape]
    model = make_model(torch.float32, preset, **overrides)
    cache = Cache(model)
    chains = [Chain(random_tokens(n, n)) for n in (1, 7, 16, 70, 150)]
    prefix, vocabulary = chains[-1], model.config.vocab_size
    found = cache.advance([(c, len(c.tokens)) for c in chains]) if moe_layers(model) else None
    if found is None:
        logits, routes = cache.native(cache.plan([(c, len(c.tokens)) for c in chains]), cache.pool, True)
        assert routes is None
        want = torch.cat([model(input_ids=torch.tensor([c.tokens])).logits[0] for c in chains])
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
        return
    answers = [Chain(random_tokens(n, 100 + n), prefix) for n in (1, 3, 20)]
    found |= cache.advance([(a, len(a.tokens)) for a in answers])
    for chain in (*chains, *answers):
        before = [] if chain.prefix is None else chain.prefix.tokens
        want, want_routes, gaps = (x[len(before) :] for x in teacher_forced(model, before + chain.tokens))
        logits, routes = found[id(chain)]
        assert logits.shape == (len(chain.tokens), vocabulary)
        agree = agreeing(routes, want_routes)
        assert agree.all() or gaps[~agree][0].min() < TIE
        torch.testing.assert_close(logits[agree], want[agree], atol=1e-4, rtol=0)


def test_routes_come_by_falling_score() -> None:
    model = make_model(torch.float32)
    chain = Chain(random_tokens(20, 5))
    _, routes = Cache(model).advance([(chain, 20)])[id(chain)]
    scores: list[torch.Tensor] = []
    for _, block in moe_layers(model):
        bias = block.gate.e_score_correction_bias
        block.gate.register_forward_hook(lambda _m, _a, logits, b=bias: scores.append(logits.sigmoid() + b))
    teacher_forced(model, chain.tokens)
    chosen = torch.stack(scores, dim=1).gather(-1, routes.long())
    assert (chosen.diff(dim=-1) <= 1e-6).all()


def test_equal_scores_choose_the_experts_that_torch_chooses() -> None:
    model = make_model(torch.float32)
    for _, block in moe_layers(model):
        block.gate.e_score_correction_bias.zero_()
        block.gate.weight.data.zero_()
        block.gate.weight.data[::3, 0] = 0.5  # a few distinct scores, most of them shared
    chain = Chain(random_tokens(40, 6))
    logits, routes = Cache(model).advance([(chain, 40)])[id(chain)]
    want, want_routes, _ = teacher_forced(model, chain.tokens)
    assert torch.equal(routes.sort(-1).values, want_routes.sort(-1).values)
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["tiny", "small, shrunk"])
def test_bf16_is_as_close_to_fp32_as_torch_is(shape: str) -> None:
    preset, overrides = SHAPES[shape]
    model = make_model(torch.bfloat16, preset, **overrides)
    chain = Chain(random_tokens(120, 7))
    logits, routes = Cache(model).advance([(chain, 120)])[id(chain)]
    want, want_routes, _ = teacher_forced(model, chain.tokens)
    exact, exact_routes, _ = teacher_forced(copy.deepcopy(model).float(), chain.tokens)
    # Of every token by itself, as nearly all flip sooner or later; what flips before it only enters through attention.
    same = (routes.sort(-1).values == want_routes.sort(-1).values).flatten(1).all(-1)
    same &= (routes.sort(-1).values == exact_routes.sort(-1).values).flatten(1).all(-1)
    assert same.float().mean() > 0.5
    native, torchs = ((x - exact)[same].square().mean().sqrt() for x in (logits, want))
    assert native < 1.2 * torchs
    assert (logits - want)[same].square().mean().sqrt() < 2 * torchs


def test_grouped_query_attention() -> None:
    config = preset_config("tiny", num_hidden_layers=2)
    config.num_key_value_heads = 2
    model = create_model(config, 0).eval()
    chain = Chain(random_tokens(50, 8))
    cache = Cache(model)
    parts = [cache.advance([(chain, n)])[id(chain)][0] for n in (20, 1, 29)]
    torch.testing.assert_close(torch.cat(parts), teacher_forced(model, chain.tokens)[0], atol=1e-4, rtol=0)


def test_a_bf16_router_weight_is_read_as_torch_reads_it() -> None:
    model = make_model(torch.bfloat16)
    assert moe_layers(model)[0][1].gate.weight.dtype == torch.bfloat16
    other = copy.deepcopy(model)
    for _, block in moe_layers(other):
        block.gate.weight.data = block.gate.weight.data.float()
    chain = Chain(random_tokens(30, 9))
    one, two = (Cache(m).advance([(replace(chain), 30)]).popitem()[1] for m in (model, other))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_only_the_wanted_logits_are_computed(tiny: Dots1ForCausalLM) -> None:
    chain = Chain(random_tokens(60, 10))
    whole, _ = Cache(tiny).advance([(chain, 60)])[id(chain)]
    other, cache = Chain(chain.tokens), Cache(tiny)
    some, routes = cache.native(cache.plan([(other, 60)], [0, 17, 18, 59]), cache.pool, False)
    assert routes is None
    assert torch.equal(some, whole[[0, 17, 18, 59]])


def test_an_empty_plan(tiny: Dots1ForCausalLM) -> None:
    cache = Cache(tiny)
    logits, _ = cache.native(cache.plan([]), cache.pool, False)
    assert logits.shape == (0, tiny.config.vocab_size)


# ------------------------------------------------------------------------------------- nothing depends on the company


def one_by_one(model: Dots1ForCausalLM, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all tokens and what the cache holds of them, each token computed by itself."""
    cache = Cache(model, block_size=16)
    prefix = Chain(prompt)
    chain = Chain(answer, prefix)
    logits = [cache.advance([(c, 1)])[id(c)][0] for c in (prefix, chain) for _ in c.tokens]
    return torch.cat(logits), torch.cat([cache.stored(prefix), cache.stored(chain)], dim=1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_do_not_depend_on_company_chunks_or_threads(tiny: Dots1ForCausalLM, data: st.DataObject) -> None:
    lengths = st.one_of(st.integers(1, 5), st.integers(60, 70), st.integers(1, 150))
    prompts = [Chain(random_tokens(data.draw(lengths), i)) for i in range(data.draw(st.integers(1, 3)))]
    for base in prompts.copy():
        for i in range(data.draw(st.integers(0, 4))):
            alike = data.draw(st.integers(0, len(base.tokens)))
            tokens = base.tokens[:alike] + random_tokens(data.draw(lengths), 50 + i)
            prompts.append(Chain(tokens, beginning=base, num_alike=alike))
    answers = [
        Chain(random_tokens(data.draw(lengths), 10 * i + j), prompt)
        for i, prompt in enumerate(prompts)
        for j in range(data.draw(st.integers(0, 20 if prompt.beginning is None else 2)))
    ]
    cache = Cache(tiny, block_size=data.draw(st.sampled_from([1, 7, 16, 64])), num_blocks=12000)
    found: dict[int, list[torch.Tensor]] = {}
    unshared = [c for c in prompts if c.beginning is not None]
    before = torch.get_num_threads()
    try:
        while waiting := [c for c in (*prompts, *answers) if c.cached < len(c.tokens)]:
            begun = [c for c in unshared if c.beginning and c.beginning.cached >= c.num_alike]
            for chain in begun:
                cache.share_beginning(chain)
            unshared = [c for c in unshared if not any(c is b for b in begun)]
            ready = [c for c in waiting if c.prefix is None or c.prefix.cached == len(c.prefix.tokens)]
            ready = [c for c in ready if not any(c is u for u in unshared)]
            some = data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=len(ready), unique_by=id))
            step = data.draw(st.sampled_from([1, 2, 40, 200]))
            torch.set_num_threads(data.draw(st.integers(1, 3)))
            advances = [(c, min(step, len(c.tokens) - c.cached)) for c in some]
            for key, (logits, _) in cache.advance(advances).items():
                found.setdefault(key, []).append(logits)
    finally:
        torch.set_num_threads(before)
    for chain in (answers[0], answers[-1]) if answers else prompts[:1]:
        prompt = chain.prefix or chain
        want, stored = one_by_one(tiny, prompt.tokens, chain.tokens if chain.prefix else [])
        parts = [prompt, chain] if chain.prefix else [chain]
        computed = torch.cat([x for c in parts for x in found[id(c)]])
        assert torch.equal(computed, want[len(want) - len(computed) :])
        assert torch.equal(torch.cat([cache.stored(c) for c in parts], dim=1), stored)


def test_nan_stays_with_the_sequence_that_has_it() -> None:
    model = make_model(torch.float32)
    model.model.embed_tokens.weight.data[3] = float("nan")
    broken, whole = Chain([1, 2, 3, 4]), Chain(random_tokens(30, 3)[1:])
    whole.tokens = [t for t in whole.tokens if t != 3]
    cache = Cache(model)
    found = cache.advance([(broken, 4), (whole, len(whole.tokens))])
    assert found[id(broken)][0][2:].isnan().all()
    alone = Chain(whole.tokens)
    assert torch.equal(found[id(whole)][0], Cache(model).advance([(alone, len(alone.tokens))])[id(alone)][0])


# ------------------------------------------------------------------------------------------------------------ sampling


def sampling_table(temperature: torch.Tensor, keys: torch.Tensor) -> SamplingTable:
    zeros = torch.zeros_like(temperature)
    return SamplingTable(temperature, zeros + 1, zeros.long(), zeros, keys)


@pytest.mark.parametrize("vocabulary", [5, 256, 1000, 40000])
def test_draws_are_those_of_torch(tiny: Dots1ForCausalLM, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 400
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits[::7, ::2] = float("-inf")
    temperature = torch.tensor([0.0, 0.3, 1.0, 1.7]).repeat(rows // 4)
    keys, positions = torch.randint(-(2**62), 2**62, (rows,), generator=generator), torch.arange(rows)
    tokens, rollout_logprobs, logprobs = make(tiny).sample_tokens(logits, temperature, keys, positions)
    want, want_rollout, want_logprobs = sample(logits, sampling_table(temperature, keys), positions)
    differ = (tokens != want).nonzero().flatten().tolist()
    for row in differ:
        cdf = (logits[row].double() / temperature[row]).softmax(-1).cumsum(-1)
        low, high = sorted((int(tokens[row]), int(want[row])))
        assert high == low + 1 or cdf[low] - cdf[high - 1] < 1e-6
    assert len(differ) <= 2 + rows * vocabulary * 1e-7
    same = tokens == want
    torch.testing.assert_close(rollout_logprobs[same], want_rollout[same], atol=1e-5, rtol=2e-6)
    torch.testing.assert_close(logprobs[same], want_logprobs[same], atol=1e-5, rtol=2e-6)


def test_rare_tokens_come_as_often_as_they_should(tiny: Dots1ForCausalLM) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    rows = 40000
    tokens, *_ = make(tiny).sample_tokens(
        probabilities.log().expand(rows, -1), torch.ones(rows), torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    )
    torch.testing.assert_close(tokens.bincount(minlength=5) / rows, probabilities, atol=0.01, rtol=0)


def test_a_row_without_numbers_has_no_token(tiny: Dots1ForCausalLM) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 20] = float("nan")
    tokens, rollout_logprobs, logprobs = make(tiny).sample_tokens(
        logits, torch.tensor([0.0, 1.0, 1.0]), torch.arange(3), torch.arange(3)
    )
    assert tokens[0] == 0
    assert tokens[1] == -1
    assert tokens[2] >= 0
    assert rollout_logprobs.isnan().tolist() == logprobs.isnan().tolist() == [False, True, False]


# ---------------------------------------------------------------------------------------------------------- boundaries


def test_the_profile_tells_where_the_time_went(tiny: Dots1ForCausalLM) -> None:
    cache = Cache(tiny)
    cache.advance([(Chain(random_tokens(30, 1)), 30)])
    seconds = cache.native.profile()
    assert all(seconds[phase] > 0 for phase in ("embed", "qkv", "attention", "output", "router", "experts", "head"))
    assert sum(cache.native.profile().values()) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": ints([0, 512, 1])}, "vocabulary"),
        ({"tokens": ints([0, -1, 1])}, "vocabulary"),
        ({"positions": ints([0, 1, 2048])}, "position"),
        ({"starts": ints([0, 2])}, "starts"),
        ({"starts": ints([1, 3])}, "starts"),
        ({"cached": ints([-1])}, "longer"),
        ({"cached": ints([14])}, "longer"),
        ({"tables": ints([[256]])}, "block"),
        ({"logits_at": ints([3])}, "logits"),
        ({"tokens": np.zeros(3, np.int64)}, "tokens is int64"),
        ({"tokens": ints(range(6))[::2]}, "contiguous"),
        ({"prefix_starts": ints([1, 3]), "prefix_tables": ints([[0]]), "prefix_lengths": ints([1])}, "prefix_starts"),
        ({"prefix_starts": ints([0, 3]), "prefix_tables": ints([[0]]), "prefix_lengths": ints([17])}, "prefix is"),
        ({"prefix_starts": ints([0, 3]), "prefix_tables": ints([[-1]]), "prefix_lengths": ints([1])}, "block"),
    ],
)
def test_a_broken_plan_is_refused(wrong: dict[str, np.ndarray], message: str) -> None:
    cache = Cache(make_model(torch.float32))
    plan = cache.plan([(Chain([1, 2, 3]), 3)])
    with pytest.raises(ValueError, match=message):
        cache.native(replace(plan, **wrong), cache.pool, False)


def test_a_cache_of_another_shape_or_precision_is_refused() -> None:
    model = make_model(torch.float32)
    cache = Cache(model)
    plan = cache.plan([(Chain([1, 2, 3]), 3)])
    for layers, heads, dtype in ((4, 4, torch.bfloat16), (3, 4, torch.float32), (4, 2, torch.float32)):
        pool = BlockPool(layers, heads, 32, 4, 16, dtype, torch.device("cpu"))
        with pytest.raises(ValueError, match="cache"):
            cache.native(plan, pool, False)


# --------------------------------------------------------------------------------------------------- never a necessity


def _spread_experts(model: Dots1ForCausalLM) -> None:
    moe_layers(model)[0][1].experts.exchange = object()


def _bias_in_bf16(model: Dots1ForCausalLM) -> None:
    gate = moe_layers(model)[0][1].gate
    gate.e_score_correction_bias = gate.e_score_correction_bias.bfloat16()


def _half(model: Dots1ForCausalLM) -> None:
    model.half()


def _transposed(model: Dots1ForCausalLM) -> None:
    layer = model.model.layers[0].self_attn.o_proj
    layer.weight = torch.nn.Parameter(layer.weight.t().contiguous().t())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_spread_experts, "spread over processes"),
        (_bias_in_bf16, "correction_bias is not fp32"),
        (_half, "float16"),
        (_transposed, "o is torch.float32"),
    ],
)
def test_a_model_that_is_not_supported(change: Callable[[Dots1ForCausalLM], None], reason: str) -> None:
    model = make_model(torch.float32)
    assert why_not(model) is None
    change(model)
    assert reason in (why_not(model) or "")
    assert native_forward(model) is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"n_group": 4, "topk_group": 2}, "n_group"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding"),
        ({"hidden_size": 144, "num_attention_heads": 9}, "hidden_size"),
        ({"num_attention_heads": 16}, "head_dim"),
        ({"moe_intermediate_size": 40}, "width"),
    ],
)
def test_a_configuration_that_is_not_supported(overrides: dict[str, object], reason: str) -> None:
    model = create_model(preset_config("tiny", **overrides), 0)
    assert reason in (why_not(model) or "")


def test_adapters_are_left_to_torch() -> None:
    adapted: Any = add_adapter(make_model(torch.float32), LoraSection(), "base")
    assert "not a plain Dots1ForCausalLM" in (why_not(adapted) or "")
    assert "adapters" in (why_not(adapted.get_base_model()) or "")


def test_no_compiler_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = make_model(torch.float32)
    with caplog.at_level(logging.INFO):
        assert native_forward(model) is None
        assert native_forward(model) is None
    assert "no compiler" in (why_not(model) or "")
    assert sum("no-such-compiler" in message for message in caplog.messages) == 1


def test_a_compiler_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in (why_not(make_model(torch.float32)) or "")
    assert not list((tmp_path / "dots_align" / "native").glob("*"))


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOTS_ALIGN_NATIVE", "0")
    assert "DOTS_ALIGN_NATIVE" in (why_not(make_model(torch.float32)) or "")


@pytest.mark.parametrize("which", ["cache", "parent"])
def test_a_directory_that_others_can_write_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = build.cache_directory()
    directory.mkdir(parents=True)
    open_one = directory if which == "cache" else tmp_path / "cache"
    open_one.chmod(0o777)
    assert "others can write" in (why_not(make_model(torch.float32)) or "")


def test_processes_that_start_together_build_one_library(tmp_path: Path) -> None:
    program = "from dots_align.rollout.native import build; build.load()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "DOTS_ALIGN_NATIVE": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    (library,) = (tmp_path / "dots_align" / "native").iterdir()
    assert library.suffix == ".so"
    assert not stat.S_IMODE(library.stat().st_mode) & 0o022


def test_a_library_that_a_failing_machine_left_empty_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, source = tmp_path / "compiler", tmp_path / "some.cpp"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" ] && [ "$1" != -o ]; do shift; done\n[ ! "$2" ] || echo it > "$2"\n')
    compiler.chmod(0o755)
    source.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    library = compiling._library_path(source, "some library")
    library.write_bytes(b"")
    assert compiling._library_path(source, "some library") == library
    assert library.read_text() == "it\n"


def test_there_is_one_openmp_runtime() -> None:
    build.load()
    assert all(build.openmp())
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len({p for p in mapped if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))}) == 1
